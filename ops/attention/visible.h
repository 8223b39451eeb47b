#pragma once
#include <cstdint>

#include "ops/attention/pattern.h"
#include "ops/core/device_code.h"

// The only definition of who sees whom, for host and device. VisibleRule is AttentionPattern
// flattened for one micro-batch; MakeVisibleRule (block_mask.h) fills it. q and k are global token
// indices (documents.h). Everything else (BlockMask, kernels, balancing) must agree with Visible(),
// and tests compare with it; document_rule.h has its closed forms.
namespace longspan::ops {

struct VisibleRule {
  PatternKind kind;
  bool bidirectional;   // kWindow, kGlobalWindow, kDilated, kRandomBlocks
  bool phase_row;       // kS2, kRandomBlocks: blocks are counted from block 0 of the row
  bool own_block;       // kRandomBlocks
  bool per_head;        // kRandomBlocks
  uint32_t limit;       // kRandomBlocks: tiles with a PairHash up to it are visible
  uint64_t seed;        // kRandomBlocks
  int64_t row_length;   // tokens
  int64_t window;       // tokens
  int64_t sinks;        // tokens: kWindow's sinks, kGlobalWindow's global tokens, kPrefix's prefix
  int64_t block;        // tokens per block of the pattern
  int64_t local;        // blocks: local blocks, kDilated's neighbours
  int64_t stride;       // blocks: kS2's stride, kDilated's dilation, kRandomBlocks' mean tile
  int64_t jitter;       // blocks: between the first and last place of a border of kRandomBlocks
  int64_t sink_blocks;  // kPower
  int64_t head_step;    // kS2; 0 when homogeneous
  int64_t head_offset;  // kS2
  int64_t first_dense;  // kS2: kv heads >= this are dense
  int64_t segment_count;
  const int64_t* segment_ends;  // [segment_count], tokens from the document's start
  const HeadSpan* spans;        // [kv heads], of kSpans
  const int32_t* doc_begin;     // [tokens], of Documents
  const int32_t* doc_end;       // [tokens], of Documents
};

// Quotients of numbers of tokens and blocks, which are below 2^32: on a GPU, dividing 64 bits takes
// ten times as long and many registers.
LONGSPAN_HD inline int64_t Quotient(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}
LONGSPAN_HD inline int64_t Remainder(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
}

// ---- random blocks ---------------------------------------------------------------------------

// A bijection of 32 bits that leaves no visible order (the final step of MurmurHash3).
LONGSPAN_HD inline uint32_t Mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// What all tiles of one kv head draw with: a number of the sequence that SplitMix64 makes of the
// seed, the first one for all heads together. Every row of a micro-batch draws the same.
struct RandomKey {
  uint32_t low, high;
};
LONGSPAN_HD inline RandomKey RandomKeyOf(uint64_t seed, bool per_head, int64_t kv_head) {
  const uint64_t number = per_head ? static_cast<uint64_t>(kv_head) + 2 : 1;
  uint64_t x = seed + number * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
}

LONGSPAN_HD inline uint32_t PairHash(RandomKey key, uint32_t row, uint32_t column) {
  return Mix(Mix(row ^ key.low) ^ (column * 0x9e3779b1u + key.high));
}

// Where tile `tile` begins, in blocks, along queries (side 0) or keys (side 1): tiles have `stride`
// blocks on average, from stride - jitter to stride + jitter.
LONGSPAN_HD inline int64_t TileBegin(const VisibleRule& r, RandomKey key, uint32_t side,
                                     int64_t tile) {
  if (r.jitter == 0 || tile == 0) return tile * r.stride;
  const uint32_t hash = PairHash({key.high, key.low}, static_cast<uint32_t>(tile), side);
  return tile * r.stride + static_cast<int64_t>(hash % static_cast<uint32_t>(r.jitter + 1)) -
         r.jitter / 2;
}

// The tile that holds block `block`; blocks and tiles count from the phase's origin.
LONGSPAN_HD inline int64_t TileOf(const VisibleRule& r, RandomKey key, uint32_t side,
                                  int64_t block) {
  const int64_t tile = Quotient(block, r.stride);
  if (block < TileBegin(r, key, side, tile)) return tile - 1;
  return block < TileBegin(r, key, side, tile + 1) ? tile : tile + 1;
}

// ---- patterns of intervals -------------------------------------------------------------------

// Where a segment begins and ends, both from the document's start.
struct Segment {
  int64_t begin, end;
};
LONGSPAN_HD inline Segment SegmentAt(const VisibleRule& r, int64_t position) {
  const int64_t* ends = r.segment_ends;
  const int64_t last = r.segment_count - 1;
  if (position >= ends[last]) {  // repeats of the last one
    const int64_t length = ends[last] - (last > 0 ? ends[last - 1] : 0);
    const int64_t begin = ends[last] + Quotient(position - ends[last], length) * length;
    return {begin, begin + length};
  }
  int64_t low = 0, high = last;  // the first end beyond the position is in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ends[middle] > position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {low > 0 ? ends[low - 1] : 0, ends[low]};
}

// Keys [doc_begin, first_end) and [begin, end).
struct KeyIntervals {
  int64_t first_end, begin, end;
};

LONGSPAN_HD inline KeyIntervals WindowKeys(int64_t doc_begin, int64_t doc_end, int64_t q,
                                           int64_t window, int64_t sinks, bool bidirectional) {
  const int64_t end = bidirectional ? q + window : q + 1;
  const int64_t last = bidirectional ? doc_end : q + 1;
  return {doc_begin + sinks < last ? doc_begin + sinks : last,
          q - window + 1 > doc_begin ? q - window + 1 : doc_begin, end < doc_end ? end : doc_end};
}

// The keys that query q sees, for all kinds but those of IsOfBlocks().
LONGSPAN_HD inline KeyIntervals KeysOf(const VisibleRule& r, int64_t kv_head, int64_t q) {
  const int64_t begin = r.doc_begin[q], end = r.doc_end[q];
  switch (r.kind) {
    case PatternKind::kFull:
      return {end, 0, 0};
    case PatternKind::kWindow:
      return WindowKeys(begin, end, q, r.window, r.sinks, r.bidirectional);
    case PatternKind::kGlobalWindow:
      if (r.bidirectional && q < begin + r.sinks) return {end, 0, 0};
      return WindowKeys(begin, end, q, r.window, r.sinks, r.bidirectional);
    case PatternKind::kSpans: {
      const HeadSpan span = r.spans[kv_head];
      if (span.window == 0) break;
      return WindowKeys(begin, end, q, span.window, span.sinks, false);
    }
    case PatternKind::kPrefix: {
      const int64_t prefix_end = begin + r.sinks < end ? begin + r.sinks : end;
      return {prefix_end > q + 1 ? prefix_end : q + 1, 0, 0};
    }
    case PatternKind::kSharedQuestion: {
      const int64_t question_end = begin + r.segment_ends[0];
      return {question_end < q + 1 ? question_end : q + 1, begin + SegmentAt(r, q - begin).begin,
              q + 1};
    }
    case PatternKind::kCausalBlockwise: {
      const int64_t segment = begin + SegmentAt(r, q - begin).begin;
      if (segment == begin + SegmentAt(r, end - 1 - begin).begin) break;
      return {begin, segment, q + 1};
    }
    case PatternKind::kBlockCausal: {
      const int64_t row = Quotient(q, r.row_length) * r.row_length;
      const int64_t block_end = row + (Quotient(q - row, r.block) + 1) * r.block;
      return {block_end < end ? block_end : end, 0, 0};
    }
    default:
      break;
  }
  return {q + 1, 0, 0};  // causal
}

// ---- patterns of blocks ----------------------------------------------------------------------

LONGSPAN_HD inline bool IsOfBlocks(PatternKind kind) {
  return kind == PatternKind::kS2 || kind == PatternKind::kPower || kind == PatternKind::kDilated ||
         kind == PatternKind::kRandomBlocks;
}

// Whether tokens of block i see tokens of block j as far as the order of tokens allows. Blocks are
// those of the row; `first` holds the document's first token; j <= i unless bidirectional.
LONGSPAN_HD inline bool SeesBlock(const VisibleRule& r, int64_t kv_head, int64_t i, int64_t j,
                                  int64_t first) {
  const int64_t distance = i - j, origin = r.phase_row ? 0 : first;
  switch (r.kind) {
    case PatternKind::kS2:
      return kv_head >= r.first_dense || distance < r.local ||
             (j - origin + kv_head * r.head_step + r.head_offset) % r.stride == 0;
    case PatternKind::kPower:
      return distance < r.local || (distance & (distance - 1)) == 0 || j - first < r.sink_blocks;
    case PatternKind::kDilated: {
      const int64_t apart = distance < 0 ? -distance : distance;
      return Remainder(apart, r.stride) == 0 && Quotient(apart, r.stride) < r.local;
    }
    default:
      break;
  }
  if (r.own_block && i == j) return true;
  const RandomKey key = RandomKeyOf(r.seed, r.per_head, kv_head);
  const int64_t row = TileOf(r, key, 0, i - origin), column = TileOf(r, key, 1, j - origin);
  return PairHash(key, static_cast<uint32_t>(row), static_cast<uint32_t>(column)) <= r.limit;
}

LONGSPAN_HD inline bool Visible(const VisibleRule& r, int64_t kv_head, int64_t q, int64_t k) {
  const int64_t begin = r.doc_begin[q];
  if (begin != r.doc_begin[k]) return false;
  if (IsOfBlocks(r.kind)) {
    if (k > q && !r.bidirectional) return false;
    const int64_t row = Quotient(q, r.row_length) * r.row_length;
    return SeesBlock(r, kv_head, Quotient(q - row, r.block), Quotient(k - row, r.block),
                     Quotient(begin - row, r.block));
  }
  const KeyIntervals keys = KeysOf(r, kv_head, q);
  return k < keys.first_end || (k >= keys.begin && k < keys.end);
}

}  // namespace longspan::ops
