#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "ops/attention/block_mask.h"
#include "ops/attention/block_rows.h"
#include "ops/attention/document_rule.h"
#include "ops/attention/id_set.h"
#include "ops/attention/token_sets.h"
#include "ops/core/check.h"

namespace longspan::ops {
namespace {

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

// One block of one axis being matched against the other axis: the borders of the visible sets cut
// the other axis into single blocks, classified one by one, and gaps in which all blocks are
// alike (inside an interval) or repeat with the stride.
class Sweep {
 public:
  Sweep(RunCollector& out, int64_t row, int64_t row_length)
      : out_(out), row_id_(row / row_length * BlocksPerRow(row_length)), row_length_(row_length) {}

  // `sets` of one piece of the block. `whole`: the piece is its whole block, so blocks inside
  // sets.all are FULL. `skip`: a block that the caller emits itself, or -1.
  void Run(const VisibleSets& sets, bool whole, int64_t skip) {
    const BlockKind inside = whole ? BlockKind::kFull : BlockKind::kPartial;
    SetCursor any(sets.any), all(sets.all);
    const StridedTokens& some = sets.any.strided;
    const StridedTokens& every = sets.all.strided;
    for (size_t i = 0; i + 1 < sets.borders.size(); ++i) {
      const int64_t from = sets.borders[i], to = sets.borders[i + 1], token = from * kMaskBlock;
      if (from == skip) continue;
      if (to - from == 1) {
        Single(any, all, whole, from);
      } else if (any.InParts(token)) {
        if (all.InParts(token)) {
          out_.Emit(row_id_, {from, to - from, 1}, inside);
        } else if (!every.range.contains(token)) {
          out_.Emit(row_id_, {from, to - from, 1}, BlockKind::kPartial);
        } else {
          for (int64_t b = from; b < to; ++b) Single(any, all, whole, b);
        }
      } else if (some.range.contains(token)) {
        Strided(some, from, to, every.range.contains(token) ? inside : BlockKind::kPartial);
      }
    }
  }

 private:
  void Single(SetCursor& any, SetCursor& all, bool whole, int64_t block) {
    const TokenRange tokens{block * kMaskBlock, std::min(row_length_, (block + 1) * kMaskBlock)};
    if (whole && all.Covers(tokens)) {
      out_.Emit(row_id_, {block, 1, 1}, BlockKind::kFull);
    } else if (any.Intersects(tokens)) {
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
  void Strided(const StridedTokens& s, int64_t from, int64_t to, BlockKind kind) {
    if (s.block >= kMaskBlock) {  // `wide` whole mask blocks per stride
      const int64_t wide = s.block / kMaskBlock, period = s.stride * wide;
      if (wide <= (to - from) / period + 1) {
        for (int64_t i = 0; i < wide; ++i) {
          Progression(s.residue * wide + i, period, from, to, kind);
        }
        return;
      }
      int64_t first = (from - s.residue * wide) / period * period + s.residue * wide;
      for (; first < to; first += period) {
        const int64_t a = std::max(from, first), b = std::min(to, first + wide);
        if (a < b) out_.Emit(row_id_, {a, b - a, 1}, kind);
      }
      return;
    }
    // Several pattern blocks per mask block: the hits repeat after `hits` strides.
    const int64_t narrow = kMaskBlock / s.block;
    const int64_t hits = narrow / std::gcd(narrow, s.stride);
    const int64_t period = hits * s.stride / narrow;
    int64_t previous = -1;
    for (int64_t i = 0; i < hits; ++i) {
      const int64_t block = (s.residue + i * s.stride) / narrow;
      if (block != previous) Progression(block, period, from, to, BlockKind::kPartial);
      previous = block;
    }
  }

  RunCollector& out_;
  const int64_t row_id_, row_length_;
};

// The largest PairHash of a visible tile: density * 2^32 of the 2^32 values are visible.
uint32_t RandomLimit(double density) {
  const double tiles = std::round(density * 0x1p32);
  return static_cast<uint32_t>(std::clamp(tiles, 1.0, 0x1p32) - 1);
}

// What the blocks of one axis meet on the other one, block by block. `rule` and `documents` must
// outlive this.
class AxisWalk {
 public:
  AxisWalk(Axis axis, const VisibleRule& rule, const Documents& documents, const BlockList& others)
      : axis_(axis),
        rule_(rule),
        documents_(documents),
        others_(others.ids),
        reach_(Reach(others)) {}

  // Adds one row of runs to `out` for each of `blocks` (global ids), for a head of the rule.
  void Append(int64_t head, std::span<const int32_t> blocks, BlockRuns& out) const {
    RunCollector collector(others_, out);
    VisibleSets sets;  // keeps its memory from block to block
    for (const int32_t id : blocks) {
      Block(head, id, sets, collector);
      collector.EndRow();
    }
  }

 private:
  // The tokens of each row from the first to the last block of `list`.
  std::vector<TokenRange> Reach(const BlockList& list) const {
    std::vector<TokenRange> reach(static_cast<size_t>(documents_.rows));
    for (const int32_t id : list.ids) {
      const auto [row, block] = TokensOfBlock(documents_.row_length, id);
      TokenRange& range = reach[static_cast<size_t>(row / documents_.row_length)];
      range = range.empty()
                  ? block
                  : TokenRange{std::min(range.begin, block.begin), std::max(range.end, block.end)};
    }
    return reach;
  }

  // The runs of one block: the keys of its queries, or the queries of its keys.
  void Block(int64_t head, int32_t id, VisibleSets& sets, RunCollector& collector) const {
    const int64_t row_length = documents_.row_length;
    const auto [row, block] = TokensOfBlock(row_length, id);
    const TokenRange row_reach = reach_[static_cast<size_t>(row / row_length)];
    Sweep sweep(collector, row, row_length);
    const int64_t own = block.begin / kMaskBlock;
    bool whole = true, sees_own = false;
    for (int64_t t = block.begin; t < block.end;) {
      const auto [document, piece] = PieceAt(documents_, row, t, block.end);
      whole = whole && piece.end == block.end;
      t = piece.end;
      const TokenRange within = Intersect(document, row_reach);
      if (within.empty()) continue;
      const DocumentRule rule(rule_, head, document);
      rule.Collect(axis_, piece, within, sets);
      // Documents of one block meet only in that block itself.
      sweep.Run(sets, whole, whole ? -1 : own);
      sees_own = sees_own || SetCursor(sets.any).Intersects(block);
    }
    if (!whole && sees_own) {
      collector.Emit(row / row_length * BlocksPerRow(row_length), {own, 1, 1}, BlockKind::kPartial);
    }
  }

  const Axis axis_;
  const VisibleRule& rule_;
  const Documents& documents_;
  const IdSet others_;
  const std::vector<TokenRange> reach_;
};

// Heads with the same rule share a pattern; `of_pattern` has the first head of each.
struct HeadPatterns {
  std::vector<int32_t> of_head;
  std::vector<int64_t> of_pattern;
};

// Equal for heads with the same rule.
std::pair<int64_t, int64_t> RuleOf(const VisibleRule& rule, int64_t head) {
  constexpr std::pair<int64_t, int64_t> kCausal{-1, 0};
  switch (rule.kind) {
    case PatternKind::kS2:
      if (head >= rule.first_dense || rule.stride == 1) return kCausal;
      return {(head * rule.head_step + rule.head_offset) % rule.stride, 0};
    case PatternKind::kSpans: {
      const HeadSpan span = rule.spans[head];
      if (span.window == 0 || span.window >= rule.row_length) return kCausal;
      return {span.window, std::min(span.sinks, rule.row_length)};
    }
    case PatternKind::kRandomBlocks:
      return {rule.per_head ? head : 0, 0};
    default:
      return {0, 0};
  }
}

HeadPatterns PatternsOf(const VisibleRule& rule, std::span<const int32_t> heads) {
  HeadPatterns patterns;
  std::vector<std::pair<int64_t, int64_t>> rules;
  for (const int32_t head : heads) {
    const auto rule_of_head = RuleOf(rule, head);
    const auto found = std::find(rules.begin(), rules.end(), rule_of_head);
    patterns.of_head.push_back(static_cast<int32_t>(found - rules.begin()));
    if (found == rules.end()) {
      rules.push_back(rule_of_head);
      patterns.of_pattern.push_back(head);
    }
  }
  return patterns;
}

void CheckArguments(const char* what, const AttentionPattern& pattern, int64_t kv_heads,
                    const Documents* documents) {
  LONGSPAN_CHECK(documents != nullptr) << what << ": documents are missing";
  const std::vector<std::string> problems = pattern.Problems(kv_heads);
  if (!problems.empty()) throw InvalidArgument("attention pattern: " + problems.front());
}

std::vector<int32_t> AllHeads(int64_t kv_heads) {
  std::vector<int32_t> heads(static_cast<size_t>(kv_heads));
  std::iota(heads.begin(), heads.end(), 0);
  return heads;
}

}  // namespace

class BlockMaskBuilder {
 public:
  BlockMaskBuilder(const AttentionPattern& pattern, int64_t kv_heads,
                   std::shared_ptr<const Documents> documents, const BlockList& queries,
                   const BlockList& keys, std::span<const int32_t> heads)
      : mask_(std::make_shared<BlockMask>()) {
    mask_->queries_ = queries;
    mask_->keys_ = keys;
    mask_->pattern_ = pattern;
    mask_->documents_ = std::move(documents);
    mask_->rule_heads_ = kv_heads;
    mask_->rule_ = MakeVisibleRule(mask_->pattern_, kv_heads, *mask_->documents_);
    HeadPatterns patterns = PatternsOf(mask_->rule_, heads);
    mask_->patterns_ = static_cast<int64_t>(patterns.of_pattern.size());
    mask_->pattern_of_head_ = std::move(patterns.of_head);
    mask_->head_of_pattern_ = std::move(patterns.of_pattern);
  }

  std::shared_ptr<const BlockMask> Build() {
    BuildAxis(Axis::kKeys, mask_->queries_, mask_->keys_, mask_->rows_);
    BuildAxis(Axis::kQueries, mask_->keys_, mask_->queries_, mask_->columns_);
    return mask_;
  }

 private:
  void BuildAxis(Axis axis, const BlockList& list, const BlockList& others, BlockRuns& out) {
    out.rows = list.size();
    out.offsets.reserve(static_cast<size_t>(mask_->patterns_ * out.rows + 1));
    out.offsets.push_back(0);
    const AxisWalk walk(axis, mask_->rule_, *mask_->documents_, others);
    for (const int64_t head : mask_->head_of_pattern_) walk.Append(head, list.ids, out);
    out.runs.shrink_to_fit();
  }

  std::shared_ptr<BlockMask> mask_;
};

std::shared_ptr<const BlockMask> BlockMask::Build(const AttentionPattern& pattern, int64_t kv_heads,
                                                  std::shared_ptr<const Documents> documents,
                                                  const BlockList& queries, const BlockList& keys) {
  CheckArguments("BlockMask::Build", pattern, kv_heads, documents.get());
  const std::vector<int32_t> heads = AllHeads(kv_heads);
  return BlockMaskBuilder(pattern, kv_heads, std::move(documents), queries, keys, heads).Build();
}

std::shared_ptr<const BlockMask> BlockMask::Build(const AttentionPattern& pattern, int64_t kv_heads,
                                                  std::shared_ptr<const Documents> documents,
                                                  const BlockList& queries, const BlockList& keys,
                                                  std::span<const int32_t> heads) {
  CheckArguments("BlockMask::Build", pattern, kv_heads, documents.get());
  for (const int32_t head : heads) {
    LONGSPAN_CHECK(head >= 0 && head < kv_heads)
        << "BlockMask::Build: head " << head << " of " << kv_heads << " kv heads";
  }
  return BlockMaskBuilder(pattern, kv_heads, std::move(documents), queries, keys, heads).Build();
}

struct BlockRowWalk::Data {
  Data(const AttentionPattern& p, int64_t kv_heads, std::shared_ptr<const Documents> d)
      : pattern(p),
        documents(std::move(d)),
        rule(MakeVisibleRule(pattern, kv_heads, *documents)),
        patterns(PatternsOf(rule, AllHeads(kv_heads))),
        all(BlockList::All(*documents)),
        walk(Axis::kKeys, rule, *documents, all) {}
  const AttentionPattern pattern;
  const std::shared_ptr<const Documents> documents;
  const VisibleRule rule;
  const HeadPatterns patterns;
  const BlockList all;
  const AxisWalk walk;
};

BlockRowWalk::BlockRowWalk(const AttentionPattern& pattern, int64_t kv_heads,
                           std::shared_ptr<const Documents> documents) {
  CheckArguments("BlockRowWalk", pattern, kv_heads, documents.get());
  data_ = std::make_unique<const Data>(pattern, kv_heads, std::move(documents));
}
BlockRowWalk::~BlockRowWalk() = default;

int64_t BlockRowWalk::patterns() const {
  return static_cast<int64_t>(data_->patterns.of_pattern.size());
}
int32_t BlockRowWalk::pattern_of(int64_t kv_head) const {
  return data_->patterns.of_head[static_cast<size_t>(kv_head)];
}
int64_t BlockRowWalk::heads_of(int64_t pattern) const {
  const std::vector<int32_t>& of_head = data_->patterns.of_head;
  return std::count(of_head.begin(), of_head.end(), pattern);
}

void BlockRowWalk::ForEach(int64_t pattern, std::span<const int32_t> blocks,
                           const Visit& visit) const {
  constexpr size_t kChunk = 64;  // blocks whose runs are found in one go
  const int64_t head = data_->patterns.of_pattern[static_cast<size_t>(pattern)];
  BlockRuns found;
  for (size_t begin = 0; begin < blocks.size(); begin += kChunk) {
    const auto chunk = blocks.subspan(begin, std::min(kChunk, blocks.size() - begin));
    found.rows = static_cast<int64_t>(chunk.size());
    found.offsets.assign(1, 0);
    found.runs.clear();
    data_->walk.Append(head, chunk, found);
    for (size_t i = 0; i < chunk.size(); ++i)
      visit(chunk[i], found.Row(0, static_cast<int64_t>(i)));
  }
}
void BlockRowWalk::ForEach(int64_t pattern, const Visit& visit) const {
  ForEach(pattern, data_->all.ids, visit);
}

int64_t BlockRowWalk::Pairs(int64_t pattern, int32_t block, const BlockRun& run) const {
  const int64_t head = data_->patterns.of_pattern[static_cast<size_t>(pattern)];
  return PairsOfRun(data_->rule, *data_->documents, head, block, run);
}

VisibleRule MakeVisibleRule(const AttentionPattern& pattern, int64_t kv_heads,
                            const Documents& documents) {
  // Nothing reaches past a row, so larger values mean the same; this keeps sums in range.
  const auto within_row = [&](int64_t n) { return std::min(n, documents.row_length); };
  VisibleRule rule{};
  rule.kind = pattern.kind;
  rule.row_length = documents.row_length;
  rule.doc_begin = documents.doc_begin.data();
  rule.doc_end = documents.doc_end.data();
  rule.segment_count = static_cast<int64_t>(pattern.segment_ends.size());
  rule.segment_ends = pattern.segment_ends.data();
  rule.spans = pattern.spans.data();
  rule.bidirectional = pattern.bidirectional;
  rule.window = within_row(pattern.window);
  rule.sinks = within_row(pattern.sinks);
  rule.block = pattern.block_size;
  switch (pattern.kind) {
    case PatternKind::kGlobalWindow:
      rule.sinks = within_row(pattern.global_tokens);
      break;
    case PatternKind::kPrefix:
      rule.sinks = within_row(pattern.prefix);
      break;
    case PatternKind::kS2:
      rule.phase_row = pattern.s2.phase == StridePhase::kRow;
      rule.block = pattern.s2.block_size;
      rule.local = within_row(pattern.s2.local_blocks);
      rule.stride = pattern.s2.stride_blocks;
      rule.head_step = pattern.HeadStep(kv_heads);
      rule.head_offset = pattern.s2.head_offset;
      rule.first_dense = kv_heads - pattern.s2.dense_heads;
      break;
    case PatternKind::kPower:
      rule.block = pattern.power.block_size;
      rule.local = within_row(pattern.power.local_blocks);
      rule.sink_blocks = within_row(pattern.power.sink_blocks);
      break;
    case PatternKind::kDilated:
      rule.bidirectional = pattern.dilated.bidirectional;
      rule.block = pattern.dilated.block_size;
      rule.local = within_row(pattern.dilated.neighbours);
      rule.stride = pattern.dilated.dilation;
      break;
    case PatternKind::kRandomBlocks: {
      const RandomBlocksOptions& random = pattern.random;
      rule.bidirectional = random.bidirectional;
      rule.phase_row = random.phase == StridePhase::kRow;
      rule.own_block = random.own_block;
      rule.per_head = random.per_head;
      rule.seed = static_cast<uint64_t>(random.seed);
      rule.limit = RandomLimit(random.density);
      rule.block = random.block_size;
      rule.stride = random.mean_blocks;
      rule.jitter = random.mean_blocks - random.min_blocks;
      break;
    }
    default:
      break;
  }
  return rule;
}

}  // namespace longspan::ops
