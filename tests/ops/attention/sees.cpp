// Who sees whom, once more: the formulas of docs/attention.md by plain counting, slow and without a
// line in common with ops/attention.
#include <cstdlib>

#include "tests/ops/attention/random_draws.h"
#include "tests/ops/attention/reference.h"

namespace longspan::test {
namespace {

using ops::AttentionPattern;
using ops::Documents;
using ops::PatternKind;

// A pair of tokens of one document, both counted from its start.
struct Pair {
  int64_t q, k;
  int64_t length;        // of the document
  int64_t start_in_row;  // of the document
  int64_t distance() const { return q > k ? q - k : k - q; }
};

// Blocks of the row's grid.
struct BlockPair {
  int64_t i, j, first;  // of the query, the key and the document's first token
};
BlockPair BlocksOf(const Pair& p, int64_t size) {
  return {(p.start_in_row + p.q) / size, (p.start_in_row + p.k) / size, p.start_in_row / size};
}

bool SeesS2(const ops::S2Options& s2, int64_t kv_heads, int64_t kv_head, const Pair& p) {
  if (!s2.homogeneous && kv_head >= kv_heads - s2.dense_heads) return true;
  const auto [i, j, first] = BlocksOf(p, s2.block_size);
  if (i < j + s2.local_blocks) return true;
  const int64_t origin = s2.phase == ops::StridePhase::kRow ? 0 : first;
  int64_t head_step = s2.head_step;
  if (head_step == 0) head_step = s2.stride_blocks >= kv_heads ? s2.stride_blocks / kv_heads : 1;
  const int64_t head = s2.homogeneous ? 0 : kv_head;
  // The key's block is on this head's stripe when a whole number of strides separates it from the
  // block that the head's shift points to.
  const int64_t distance = j - origin + head * head_step + s2.head_offset;
  return distance == distance / s2.stride_blocks * s2.stride_blocks;
}

bool SeesPower(const ops::PowerOptions& power, const Pair& p) {
  const auto [i, j, first] = BlocksOf(p, power.block_size);
  if (j < first + power.sink_blocks || i < j + power.local_blocks) return true;
  for (int64_t jump = 1; j + jump <= i; jump *= 2) {
    if (j + jump == i) return true;
  }
  return false;
}

bool SeesDilated(const ops::DilatedOptions& dilated, const Pair& p) {
  const auto [i, j, first] = BlocksOf(p, dilated.block_size);
  for (int64_t n = 0; n < dilated.neighbours && n * dilated.dilation <= std::abs(i - j); ++n) {
    if (n * dilated.dilation == std::abs(i - j)) return true;
  }
  return false;
}

// The segment of a position, by walking over all of them.
struct Walk {
  int64_t number, begin;
};
Walk SegmentOf(const std::vector<int64_t>& ends, int64_t position) {
  const size_t given = ends.size();
  const int64_t last = given > 1 ? ends[given - 1] - ends[given - 2] : ends[0];
  Walk walk{0, 0};
  for (int64_t end = ends[0]; end <= position;) {
    walk = {walk.number + 1, end};
    end = walk.number < static_cast<int64_t>(given) ? ends[static_cast<size_t>(walk.number)]
                                                    : end + last;
  }
  return walk;
}

bool SeesRandom(const ops::RandomBlocksOptions& random, int64_t kv_head, const Pair& p) {
  const auto [i, j, first] = BlocksOf(p, random.block_size);
  if (random.own_block && i == j) return true;
  const int64_t origin = random.phase == ops::StridePhase::kRow ? 0 : first;
  const RandomDraws draws(random, kv_head);
  return draws.Drawn(draws.TileOf(i - origin, 0), draws.TileOf(j - origin, 1));
}

bool SeesInDocument(const AttentionPattern& pattern, int64_t kv_heads, int64_t kv_head,
                    const Pair& p) {
  const bool past = p.k <= p.q;
  switch (pattern.kind) {
    case PatternKind::kFull:
      return true;
    case PatternKind::kCausal:
      return past;
    case PatternKind::kWindow:
      return (past || pattern.bidirectional) &&
             (p.distance() < pattern.window || p.k < pattern.sinks);
    case PatternKind::kS2:
      return past && SeesS2(pattern.s2, kv_heads, kv_head, p);
    case PatternKind::kGlobalWindow:
      return (past || pattern.bidirectional) &&
             (p.distance() < pattern.window || p.k < pattern.global_tokens ||
              p.q < pattern.global_tokens);
    case PatternKind::kPower:
      return past && SeesPower(pattern.power, p);
    case PatternKind::kDilated:
      return (past || pattern.dilated.bidirectional) && SeesDilated(pattern.dilated, p);
    case PatternKind::kPrefix:
      return past || p.k < pattern.prefix;
    case PatternKind::kSharedQuestion: {
      const Walk q = SegmentOf(pattern.segment_ends, p.q), k = SegmentOf(pattern.segment_ends, p.k);
      return past && (q.number == k.number || k.number == 0);
    }
    case PatternKind::kCausalBlockwise: {
      const Walk q = SegmentOf(pattern.segment_ends, p.q), k = SegmentOf(pattern.segment_ends, p.k);
      const Walk last = SegmentOf(pattern.segment_ends, p.length - 1);
      return past && (q.number == k.number || q.number == last.number);
    }
    case PatternKind::kBlockCausal: {
      const BlockPair blocks = BlocksOf(p, pattern.block_size);
      return blocks.j <= blocks.i;
    }
    case PatternKind::kRandomBlocks:
      return (past || pattern.random.bidirectional) && SeesRandom(pattern.random, kv_head, p);
    case PatternKind::kSpans: {
      const ops::HeadSpan& span = pattern.spans[static_cast<size_t>(kv_head)];
      return past && (span.window == 0 || p.distance() < span.window || p.k < span.sinks);
    }
  }
  return false;
}

}  // namespace

bool Sees(const AttentionPattern& pattern, int64_t kv_heads, const Documents& documents,
          int64_t kv_head, int64_t q, int64_t k) {
  const int64_t start = documents.doc_begin[static_cast<size_t>(q)];
  const int64_t stop = documents.doc_end[static_cast<size_t>(q)];
  if (k < start || k >= stop) return false;
  return SeesInDocument(pattern, kv_heads, kv_head,
                        {q - start, k - start, stop - start, start % documents.row_length});
}

}  // namespace longspan::test
