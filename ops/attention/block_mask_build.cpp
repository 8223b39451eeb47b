#include <algorithm>
#include <numeric>

#include "ops/attention/block_mask.h"
#include "ops/attention/id_set.h"
#include "ops/attention/token_sets.h"
#include "ops/core/check.h"

namespace longspan::ops {
namespace {

constexpr int64_t FloorBlock(int64_t token) { return token / kMaskBlock; }
constexpr int64_t CeilBlock(int64_t token) { return (token + kMaskBlock - 1) / kMaskBlock; }

// Ascending, distinct block borders of one sweep: few, so a plain array and insertion sort.
class Borders {
 public:
  void AddRange(TokenRange range) {
    if (range.empty()) return;
    for (const int64_t token : {range.begin, range.end}) {
      Add(FloorBlock(token));
      Add(CeilBlock(token));
    }
  }
  void AddSet(const TokenSet& set) {
    AddRange(set.part[0]);
    AddRange(set.part[1]);
    AddRange(set.strided);
  }
  void Add(int64_t block) {
    int i = n_;
    while (i > 0 && at_[i - 1] > block) --i;
    if (i > 0 && at_[i - 1] == block) return;
    for (int j = n_; j > i; --j) at_[j] = at_[j - 1];
    at_[i] = block;
    ++n_;
  }
  int size() const { return n_; }
  int64_t operator[](int i) const { return at_[i]; }

 private:
  int64_t at_[32];
  int n_ = 0;
};

// Collects the runs of one row or column, restricted to the other axis's ids, and writes them in
// canonical order.
class RunCollector {
 public:
  RunCollector(const IdSet& others, BlockRuns& out) : others_(others), out_(out) {}

  // `run` in blocks of the row whose block 0 has id `row_id`.
  void Emit(int64_t row_id, IdRun run, BlockKind kind) {
    run.first += row_id;
    others_.ForEachCommon(run, [&](const IdRun& common) {
      std::vector<BlockRun>& to = kind == BlockKind::kFull ? full_ : partial_;
      if (kind == BlockKind::kFull && common.step == 1 && !to.empty()) {
        BlockRun& last = to.back();
        if ((last.count == 1 || last.step == 1) && last.block(last.count - 1) + 1 == common.first) {
          last.count += static_cast<int32_t>(common.count);
          last.step = 1;
          return;
        }
      }
      BlockRun b{static_cast<int32_t>(common.first), static_cast<int32_t>(common.count), 1, 0};
      b.step = static_cast<int32_t>(common.step);
      b.partial = kind == BlockKind::kPartial;
      to.push_back(b);
    });
  }
  void EndRow() {
    for (std::vector<BlockRun>* list : {&full_, &partial_}) {
      const auto before = [](const BlockRun& a, const BlockRun& b) { return a.first < b.first; };
      if (!std::is_sorted(list->begin(), list->end(), before)) {
        std::sort(list->begin(), list->end(), before);
      }
      out_.runs.insert(out_.runs.end(), list->begin(), list->end());
      list->clear();
    }
    out_.offsets.push_back(static_cast<int64_t>(out_.runs.size()));
  }

 private:
  const IdSet& others_;
  BlockRuns& out_;
  std::vector<BlockRun> full_, partial_;
};

// One block of one axis being matched against the other axis: every border of the visible sets cuts
// the other axis into single blocks, classified one by one, and gaps in which all blocks are
// alike (inside an interval) or repeat with the stride.
class Sweep {
 public:
  Sweep(RunCollector& out, int64_t row, int64_t row_length)
      : out_(out), row_id_(row / row_length * BlocksPerRow(row_length)), row_length_(row_length) {}

  // `any` and `all`: tokens of the other axis that are visible with some or all tokens of this
  // piece. `whole`: the piece is its whole block, so blocks inside `all` are FULL. `skip`: a
  // block that the caller emits itself, or -1.
  void Run(const DocumentRule& rule, const TokenSet& any, const TokenSet& all, bool whole,
           int64_t skip) {
    Borders borders;
    borders.AddSet(any);
    borders.AddSet(all);
    if (skip >= 0) {
      borders.Add(skip);
      borders.Add(skip + 1);
    }
    const BlockKind inside = whole ? BlockKind::kFull : BlockKind::kPartial;
    for (int i = 0; i + 1 < borders.size(); ++i) {
      const int64_t from = borders[i], to = borders[i + 1], token = from * kMaskBlock;
      if (from == skip) continue;
      if (to - from == 1) {
        Single(rule, any, all, whole, from);
      } else if (InParts(any, token)) {
        if (InParts(all, token)) {
          out_.Emit(row_id_, {from, to - from, 1}, inside);
        } else if (!all.strided.contains(token)) {
          out_.Emit(row_id_, {from, to - from, 1}, BlockKind::kPartial);
        } else {
          for (int64_t b = from; b < to; ++b) Single(rule, any, all, whole, b);
        }
      } else if (any.strided.contains(token)) {
        Strided(rule, from, to, all.strided.contains(token) ? inside : BlockKind::kPartial);
      }
    }
  }

 private:
  static bool InParts(const TokenSet& set, int64_t token) {
    return set.part[0].contains(token) || set.part[1].contains(token);
  }
  void Single(const DocumentRule& rule, const TokenSet& any, const TokenSet& all, bool whole,
              int64_t block) {
    const TokenRange tokens{block * kMaskBlock, std::min(row_length_, (block + 1) * kMaskBlock)};
    if (whole && rule.Covers(all, tokens)) {
      out_.Emit(row_id_, {block, 1, 1}, BlockKind::kFull);
    } else if (rule.Intersects(any, tokens)) {
      out_.Emit(row_id_, {block, 1, 1}, BlockKind::kPartial);
    }
  }
  void Progression(int64_t residue, int64_t period, int64_t from, int64_t to, BlockKind kind) {
    int64_t m = (residue - from) % period;
    if (m < 0) m += period;
    const int64_t first = from + m;
    if (first >= to) return;
    const int64_t count = (to - 1 - first) / period + 1;
    out_.Emit(row_id_, {first, count, count == 1 ? 1 : period}, kind);
  }
  // The strided family in mask blocks [from, to). The entries of one run are equally visible.
  void Strided(const DocumentRule& rule, int64_t from, int64_t to, BlockKind kind) {
    if (rule.block() >= kMaskBlock) {  // `wide` whole mask blocks per stride
      const int64_t wide = rule.block() / kMaskBlock, period = rule.stride() * wide;
      if (wide <= (to - from) / period + 1) {
        for (int64_t i = 0; i < wide; ++i) {
          Progression(rule.residue() * wide + i, period, from, to, kind);
        }
        return;
      }
      int64_t first = (from - rule.residue() * wide) / period * period + rule.residue() * wide;
      for (; first < to; first += period) {
        const int64_t a = std::max(from, first), b = std::min(to, first + wide);
        if (a < b) out_.Emit(row_id_, {a, b - a, 1}, kind);
      }
      return;
    }
    // Several pattern blocks per mask block: the hits repeat after `hits` strides.
    const int64_t narrow = kMaskBlock / rule.block();
    const int64_t hits = narrow / std::gcd(narrow, rule.stride());
    const int64_t period = hits * rule.stride() / narrow;
    int64_t previous = -1;
    for (int64_t i = 0; i < hits; ++i) {
      const int64_t block = (rule.residue() + i * rule.stride()) / narrow;
      if (block != previous) Progression(block, period, from, to, BlockKind::kPartial);
      previous = block;
    }
  }

  RunCollector& out_;
  const int64_t row_id_, row_length_;
};

}  // namespace

class BlockMaskBuilder {
 public:
  BlockMaskBuilder(const AttentionPattern& pattern, int64_t kv_heads,
                   std::shared_ptr<const Documents> documents, const BlockList& queries,
                   const BlockList& keys)
      : mask_(std::make_shared<BlockMask>()) {
    mask_->queries_ = queries;
    mask_->keys_ = keys;
    mask_->rule_ = MakeVisibleRule(pattern, kv_heads, *documents);
    mask_->documents_ = std::move(documents);
    FindPatterns(kv_heads);
  }

  std::shared_ptr<const BlockMask> Build() {
    const IdSet query_ids(mask_->queries_.ids), key_ids(mask_->keys_.ids);
    BuildAxis(mask_->queries_, key_ids, true, mask_->rows_);
    BuildAxis(mask_->keys_, query_ids, false, mask_->columns_);
    return mask_;
  }

 private:
  // Heads share a pattern when their rules are equal: dense ones, and equal residues of the stride.
  void FindPatterns(int64_t kv_heads) {
    const VisibleRule& rule = mask_->rule_;
    std::vector<int64_t> shifts;  // of each pattern; -1 for dense
    for (int64_t h = 0; h < kv_heads; ++h) {
      int64_t shift = -1;
      if (rule.kind == static_cast<int>(PatternKind::kS2) && h < rule.s2_first_dense) {
        shift = (h * rule.s2_head_step + rule.s2_head_offset) % rule.s2_stride;
        if (rule.s2_stride == 1) shift = -1;
      }
      const auto found = std::find(shifts.begin(), shifts.end(), shift);
      mask_->pattern_of_head_.push_back(static_cast<int32_t>(found - shifts.begin()));
      if (found == shifts.end()) {
        shifts.push_back(shift);
        mask_->head_of_pattern_.push_back(h);
      }
    }
    mask_->patterns_ = static_cast<int64_t>(shifts.size());
  }

  void BuildAxis(const BlockList& list, const IdSet& others, bool is_query, BlockRuns& out) {
    out.rows = list.size();
    out.offsets.reserve(static_cast<size_t>(mask_->patterns_ * out.rows + 1));
    out.offsets.push_back(0);
    RunCollector collector(others, out);
    for (int64_t p = 0; p < mask_->patterns_; ++p) {
      const int64_t head = mask_->head_of_pattern_[static_cast<size_t>(p)];
      for (const int32_t id : list.ids) {
        Block(head, id, is_query, collector);
        collector.EndRow();
      }
    }
    out.runs.shrink_to_fit();
  }

  // The runs of one block: as queries against keys, or as keys against queries.
  void Block(int64_t head, int32_t id, bool is_query, RunCollector& collector) {
    const Documents& documents = *mask_->documents_;
    const auto [row, block] = TokensOfBlock(documents.row_length, id);
    Sweep sweep(collector, row, documents.row_length);
    const int64_t own = FloorBlock(block.begin);
    bool whole = true;
    for (int64_t t = block.begin; t < block.end;) {
      const auto [document, piece] = PieceAt(documents, row, t, block.end);
      whole = whole && piece.end == block.end;
      const DocumentRule rule(mask_->rule_, head, document.begin, document.end);
      // Documents of one block meet only in that block itself, where every token sees itself.
      const int64_t skip = whole ? -1 : own;
      if (is_query) {
        sweep.Run(rule, rule.KeysOfAny(piece), rule.KeysOfAll(piece), whole, skip);
      } else {
        sweep.Run(rule, {.part = {rule.QueriesOfAny(piece), {}}, .strided = {}},
                  {.part = {rule.QueriesOfAll(piece), {}}, .strided = {}}, whole, skip);
      }
      t = piece.end;
    }
    if (!whole) {
      collector.Emit(row / documents.row_length * BlocksPerRow(documents.row_length), {own, 1, 1},
                     BlockKind::kPartial);
    }
  }

  std::shared_ptr<BlockMask> mask_;
};

std::shared_ptr<const BlockMask> BlockMask::Build(const AttentionPattern& pattern, int64_t kv_heads,
                                                  std::shared_ptr<const Documents> documents,
                                                  const BlockList& queries, const BlockList& keys) {
  LONGSPAN_CHECK(documents != nullptr) << "BlockMask::Build: documents are missing";
  const std::vector<std::string> problems = pattern.Problems(kv_heads);
  if (!problems.empty()) throw InvalidArgument("attention pattern: " + problems.front());
  return BlockMaskBuilder(pattern, kv_heads, std::move(documents), queries, keys).Build();
}

VisibleRule MakeVisibleRule(const AttentionPattern& pattern, int64_t kv_heads,
                            const Documents& documents) {
  // Nothing reaches past a row, so larger values mean the same; this keeps sums in range.
  const auto within_row = [&](int64_t n) { return std::min(n, documents.row_length); };
  return {.kind = static_cast<int32_t>(pattern.kind),
          .s2_phase_row = pattern.s2.phase == StridePhase::kRow,
          .row_length = documents.row_length,
          .window = within_row(pattern.window),
          .sinks = within_row(pattern.sinks),
          .s2_block = pattern.s2.block_size,
          .s2_local = within_row(pattern.s2.local_blocks),
          .s2_stride = pattern.s2.stride_blocks,
          .s2_head_step = pattern.HeadStep(kv_heads),
          .s2_head_offset = pattern.s2.head_offset,
          .s2_first_dense = kv_heads - pattern.s2.dense_heads,
          .doc_begin = documents.doc_begin.data()};
}

}  // namespace longspan::ops
