#include "ops/attention/token_sets.h"

#include "ops/attention/block_mask.h"

namespace longspan::ops {
namespace {

constexpr int kFull = static_cast<int>(PatternKind::kFull);
constexpr int kCausal = static_cast<int>(PatternKind::kCausal);
constexpr int kWindow = static_cast<int>(PatternKind::kWindow);

// `low` and `high` as the parts of a set, joined where they touch; low.begin <= high.begin.
TokenSet Join(TokenRange low, TokenRange high) {
  if (low.empty()) return {.part = {high, {}}, .strided = {}};
  if (high.empty()) return {.part = {low, {}}, .strided = {}};
  if (low.end >= high.begin) {
    return {.part = {{low.begin, std::max(low.end, high.end)}, {}}, .strided = {}};
  }
  return {.part = {low, high}, .strided = {}};
}

}  // namespace

DocumentRule::DocumentRule(const VisibleRule& rule, int64_t kv_head, int64_t begin, int64_t end)
    : kind_(rule.kind),
      begin_(begin),
      end_(end),
      window_(rule.window),
      sinks_(rule.sinks),
      block_(rule.s2_block),
      local_(rule.s2_local),
      stride_(1),
      residue_(0) {
  if (kind_ == kFull || kind_ == kCausal || kind_ == kWindow) return;
  if (kv_head >= rule.s2_first_dense || rule.s2_stride == 1) {
    kind_ = kCausal;
    return;
  }
  stride_ = rule.s2_stride;
  const int64_t first = rule.s2_phase_row ? 0 : begin / block_;
  const int64_t shift = (kv_head * rule.s2_head_step + rule.s2_head_offset) % stride_;
  residue_ = (first % stride_ + stride_ - shift) % stride_;
}

TokenSet DocumentRule::KeysOfAny(TokenRange q) const {
  if (kind_ == kFull) return {.part = {{begin_, end_}, {}}, .strided = {}};
  if (kind_ == kCausal) return {.part = {{begin_, q.end}, {}}, .strided = {}};
  if (kind_ == kWindow) {
    return Join({begin_, std::min(begin_ + sinks_, q.end)},
                {std::max(begin_, q.begin - window_ + 1), q.end});
  }
  // The first query is the last to lose a local block; later keys see themselves.
  const int64_t local = std::max(begin_, (q.begin / block_ - local_ + 1) * block_);
  return {.part = {{local, q.end}, {}}, .strided = {begin_, local}};
}

TokenSet DocumentRule::KeysOfAll(TokenRange q) const {
  if (kind_ == kFull) return {.part = {{begin_, end_}, {}}, .strided = {}};
  const int64_t end = q.begin + 1;  // causal: the first query decides
  if (kind_ == kCausal) return {.part = {{begin_, end}, {}}, .strided = {}};
  if (kind_ == kWindow) {
    return Join({begin_, std::min(begin_ + sinks_, end)}, {std::max(begin_, q.end - window_), end});
  }
  const int64_t local =
      std::min(end, std::max(begin_, ((q.end - 1) / block_ - local_ + 1) * block_));
  return {.part = {{local, end}, {}}, .strided = {begin_, local}};
}

TokenRange DocumentRule::QueriesOfAny(TokenRange k) const {
  if (kind_ == kFull) return {begin_, end_};
  if (kind_ == kCausal) return {k.begin, end_};
  if (kind_ == kWindow) {
    if (k.begin < begin_ + sinks_) return {k.begin, end_};
    return {k.begin, std::min(end_, k.end - 1 + window_)};
  }
  if (NextStrided(k.begin / block_) * block_ < k.end) return {k.begin, end_};
  return {k.begin, std::min(end_, ((k.end - 1) / block_ + local_) * block_)};
}

TokenRange DocumentRule::QueriesOfAll(TokenRange k) const {
  if (kind_ == kFull) return {begin_, end_};
  const int64_t from = k.end - 1;  // causal: the last key decides
  if (kind_ == kCausal) return {from, end_};
  if (kind_ == kWindow) {
    const int64_t oldest = std::max(k.begin, begin_ + sinks_);  // first key that is no sink
    return {from, oldest < k.end ? std::min(end_, oldest + window_) : end_};
  }
  // The first key outside the strided family leaves the local range first.
  int64_t oldest = k.begin / block_;
  if (oldest % stride_ == residue_) ++oldest;
  if (oldest * block_ >= k.end) return {from, end_};
  return {from, std::min(end_, (oldest + local_) * block_)};
}

bool DocumentRule::Intersects(const TokenSet& set, TokenRange tokens) const {
  for (const TokenRange& part : set.part) {
    if (!Intersect(part, tokens).empty()) return true;
  }
  const TokenRange s = Intersect(set.strided, tokens);
  return !s.empty() && NextStrided(s.begin / block_) * block_ < s.end;
}

bool DocumentRule::Covers(const TokenSet& set, TokenRange tokens) const {
  int64_t t = tokens.begin;
  while (t < tokens.end) {
    if (set.part[0].contains(t)) {
      t = set.part[0].end;
    } else if (set.part[1].contains(t)) {
      t = set.part[1].end;
    } else if (set.strided.contains(t) && t / block_ % stride_ == residue_) {
      t = std::min(set.strided.end, (t / block_ + 1) * block_);
    } else {
      return false;
    }
  }
  return true;
}

int64_t DocumentRule::StridedBelow(int64_t token) const {
  const int64_t whole = token / block_;
  const int64_t blocks = whole > residue_ ? (whole - residue_ + stride_ - 1) / stride_ : 0;
  return blocks * block_ + (whole % stride_ == residue_ ? token % block_ : 0);
}

int64_t DocumentRule::Count(const TokenSet& set, TokenRange tokens) const {
  int64_t n = Intersect(set.part[0], tokens).size() + Intersect(set.part[1], tokens).size();
  const TokenRange s = Intersect(set.strided, tokens);
  if (!s.empty()) n += StridedBelow(s.end) - StridedBelow(s.begin);
  return n;
}

uint64_t DocumentRule::Bits(const TokenSet& set, int64_t first) const {
  uint64_t bits = RangeBits(set.part[0], first) | RangeBits(set.part[1], first);
  const TokenRange s = Intersect(set.strided, {first, first + 64});
  if (s.empty()) return bits;
  for (int64_t j = NextStrided(s.begin / block_); j * block_ < s.end; j += stride_) {
    bits |= RangeBits(Intersect(s, {j * block_, (j + 1) * block_}), first);
  }
  return bits;
}

BlockPlace TokensOfBlock(int64_t row_length, int32_t id) {
  const int64_t per_row = BlocksPerRow(row_length);
  const int64_t begin = id % per_row * kMaskBlock;
  return {id / per_row * row_length, {begin, std::min(row_length, begin + kMaskBlock)}};
}

void VisibleBitsOfKeys(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                       int32_t query_block, int32_t key_block, uint64_t bits[64]) {
  std::fill(bits, bits + 64, 0);
  const auto [q_row, q] = TokensOfBlock(documents.row_length, query_block);
  const auto [k_row, k] = TokensOfBlock(documents.row_length, key_block);
  if (q_row != k_row) return;
  for (int64_t t = k.begin; t < k.end;) {
    const auto [document, piece] = PieceAt(documents, k_row, t, k.end);
    const DocumentRule in(rule, kv_head, document.begin, document.end);
    for (; t < piece.end; ++t) {
      const TokenRange seen = Intersect(in.QueriesOfAny({t, t + 1}), q);
      bits[t - k.begin] = RangeBits(seen, q.begin);
    }
  }
}

void VisibleBitsOfQueries(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                          int32_t query_block, int32_t key_block, uint64_t bits[64]) {
  std::fill(bits, bits + 64, 0);
  const auto [q_row, q] = TokensOfBlock(documents.row_length, query_block);
  const auto [k_row, k] = TokensOfBlock(documents.row_length, key_block);
  if (q_row != k_row) return;
  for (int64_t t = q.begin; t < q.end;) {
    const auto [document, piece] = PieceAt(documents, q_row, t, q.end);
    const DocumentRule in(rule, kv_head, document.begin, document.end);
    for (; t < piece.end; ++t) {
      bits[t - q.begin] = in.Bits(in.KeysOfAny({t, t + 1}), k.begin) & RangeBits(k, k.begin);
    }
  }
}

int64_t VisiblePairsOfBlocks(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                             int32_t query_block, int32_t key_block) {
  const auto [q_row, q] = TokensOfBlock(documents.row_length, query_block);
  const auto [k_row, k] = TokensOfBlock(documents.row_length, key_block);
  if (q_row != k_row) return 0;
  int64_t pairs = 0;
  for (int64_t t = q.begin; t < q.end;) {
    const auto [document, piece] = PieceAt(documents, q_row, t, q.end);
    const DocumentRule in(rule, kv_head, document.begin, document.end);
    for (; t < piece.end; ++t) pairs += in.Count(in.KeysOfAny({t, t + 1}), k);
  }
  return pairs;
}

}  // namespace longspan::ops
