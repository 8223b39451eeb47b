#include "ops/attention/token_sets.h"

#include <bit>

#include "ops/attention/block_mask.h"
#include "ops/attention/document_rule.h"

namespace longspan::ops {

void TokenSet::Clip(TokenRange range) {
  size_t kept = 0;
  for (const TokenRange& part : parts) {
    const TokenRange common = Intersect(part, range);
    if (!common.empty()) parts[kept++] = common;
  }
  parts.resize(kept);
  strided.range = Intersect(strided.range, range);
}

void TokenSet::Unite(std::span<const TokenRange> ranges) {
  if (ranges.empty()) return;
  if (!parts.empty() && ranges.front().begin < parts.back().begin) {
    TokenSet merged;
    size_t i = 0;
    for (const TokenRange& range : ranges) {
      for (; i < parts.size() && parts[i].begin <= range.begin; ++i) merged.Append(parts[i]);
      merged.Append(range);
    }
    for (; i < parts.size(); ++i) merged.Append(parts[i]);
    parts.swap(merged.parts);
    return;
  }
  for (const TokenRange& range : ranges) Append(range);
}

void TokenSet::IntersectWith(std::span<const TokenRange> ranges) {
  std::vector<TokenRange> common;
  for (size_t i = 0, j = 0; i < parts.size() && j < ranges.size();) {
    const TokenRange both = Intersect(parts[i], ranges[j]);
    if (!both.empty()) common.push_back(both);
    ++(parts[i].end < ranges[j].end ? i : j);
  }
  parts.swap(common);
}

uint64_t TokenSet::Bits(int64_t first) const {
  uint64_t bits = 0;
  for (const TokenRange& part : parts) bits |= RangeBits(part, first);
  const TokenRange s = Intersect(strided.range, {first, first + 64});
  if (s.empty()) return bits;
  for (int64_t j = strided.NextBlock(s.begin / strided.block); j * strided.block < s.end;
       j += strided.stride) {
    bits |= RangeBits(Intersect(s, {j * strided.block, (j + 1) * strided.block}), first);
  }
  return bits;
}

bool SetCursor::Covers(TokenRange tokens) {
  const StridedTokens& strided = set_.strided;
  int64_t t = tokens.begin;
  while (t < tokens.end && strided.contains(t)) {
    t = std::min(strided.range.end, (t / strided.block + 1) * strided.block);
  }
  // Parts do not touch, so one has to hold the rest.
  return t >= tokens.end || (InParts(t) && set_.parts[at_].end >= tokens.end);
}

BlockPlace TokensOfBlock(int64_t row_length, int32_t id) {
  const int64_t per_row = BlocksPerRow(row_length);
  const int64_t begin = id % per_row * kMaskBlock;
  return {id / per_row * row_length, {begin, std::min(row_length, begin + kMaskBlock)}};
}

namespace {

// Bits of the tokens of block `own` (of `axis`'s other side) over the 64 tokens of block `other`.
void VisibleBits(Axis axis, const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                 int32_t own, int32_t other, uint64_t bits[64]) {
  std::fill(bits, bits + 64, 0);
  const auto [row, tokens] = TokensOfBlock(documents.row_length, own);
  const auto [other_row, within] = TokensOfBlock(documents.row_length, other);
  if (row != other_row) return;
  thread_local TokenSet fixed;  // keeps its memory
  for (int64_t t = tokens.begin; t < tokens.end;) {
    const auto [document, piece] = PieceAt(documents, row, t, tokens.end);
    const TokenRange met = Intersect(document, within);
    if (met.empty()) {
      t = piece.end;
      continue;
    }
    const DocumentRule in(rule, kv_head, document);
    while (t < piece.end) {
      const DocumentRule::Unit unit = in.At(axis, t, met, fixed);
      const uint64_t common = fixed.Bits(within.begin) & RangeBits(met, within.begin);
      for (const int64_t end = std::min(unit.end, piece.end); t < end; ++t) {
        const TokenRange near = Intersect({t - unit.window + 1, t + unit.window}, met);
        uint64_t word = common | RangeBits(near, within.begin);
        if (unit.causal) word &= RangeBits(DocumentRule::InOrder(axis, t), within.begin);
        bits[t - tokens.begin] = word;
      }
    }
  }
}

}  // namespace

void VisibleBitsOfKeys(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                       int32_t query_block, int32_t key_block, uint64_t bits[64]) {
  VisibleBits(Axis::kQueries, rule, documents, kv_head, key_block, query_block, bits);
}

void VisibleBitsOfQueries(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                          int32_t query_block, int32_t key_block, uint64_t bits[64]) {
  VisibleBits(Axis::kKeys, rule, documents, kv_head, query_block, key_block, bits);
}

int64_t VisiblePairsOfBlocks(const VisibleRule& rule, const Documents& documents, int64_t kv_head,
                             int32_t query_block, int32_t key_block) {
  uint64_t bits[64];
  VisibleBitsOfQueries(rule, documents, kv_head, query_block, key_block, bits);
  int64_t pairs = 0;
  for (const uint64_t word : bits) pairs += std::popcount(word);
  return pairs;
}

}  // namespace longspan::ops
