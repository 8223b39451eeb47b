#pragma once
#include <cstdint>

#include "ops/attention/visible.h"

namespace longspan::ops::mma {

// Bits [begin - first, end - first) of 32, clipped.
LONGSPAN_HD inline uint32_t IntervalBits(int64_t begin, int64_t end, int64_t first) {
  const int64_t a = begin > first ? begin - first : 0;
  const int64_t b = end - first < 32 ? end - first : 32;
  if (a >= b) return 0;
  return (0xffffffffu >> (32 - (b - a))) << a;
}

// Bit j: query q sees key first_key + j, for j < keys (at most 32); all tokens lie in one row.
// Visible() for a whole word, with what depends on the query alone computed once; tests compare the
// two.
LONGSPAN_HD inline uint32_t VisibleKeys(const VisibleRule& r, int64_t kv_head, int64_t q,
                                        int64_t first_key, int keys) {
  const int64_t begin = r.doc_begin[q], end = first_key + keys;
  if (r.kind == 0) {  // the end of the document is not in the rule
    uint32_t bits = 0;
    for (int j = 0; j < keys; ++j) {
      bits |= static_cast<uint32_t>(r.doc_begin[first_key + j] == begin) << j;
    }
    return bits;
  }
  // A key between its document's begin and the query is of the same document.
  const uint32_t past = IntervalBits(begin, q + 1 < end ? q + 1 : end, first_key);
  if (r.kind == 1) return past;
  if (r.kind == 2) {
    const int64_t reach = r.window <= q ? q - r.window + 1 : 0;  // windows may be huge
    const int64_t sinks = r.sinks < end ? begin + r.sinks : end;
    return past & (IntervalBits(reach, end, first_key) | IntervalBits(begin, sinks, first_key));
  }
  if (kv_head >= r.s2_first_dense) return past;
  const int64_t row = q / r.row_length * r.row_length;
  const int64_t query_block = (q - row) / r.s2_block;
  // q - k < local blocks: blocks from here on.
  const int64_t near =
      query_block < r.s2_local ? 0 : row + (query_block - r.s2_local + 1) * r.s2_block;
  uint32_t bits = IntervalBits(near, end, first_key);
  const int64_t shift = kv_head * r.s2_head_step + r.s2_head_offset -
                        (r.s2_phase_row ? 0 : (begin - row) / r.s2_block);
  const int64_t first_block = (first_key - row) / r.s2_block;
  for (int64_t b = first_block, at = row + b * r.s2_block; at < end; ++b, at += r.s2_block) {
    if ((b + shift) % r.s2_stride == 0) bits |= IntervalBits(at, at + r.s2_block, first_key);
  }
  return past & bits;
}

}  // namespace longspan::ops::mma
