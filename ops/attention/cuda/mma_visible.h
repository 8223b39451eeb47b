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
  if (!IsOfBlocks(r.kind)) {
    const KeyIntervals seen = KeysOf(r, kv_head, q);
    return IntervalBits(begin, seen.first_end < end ? seen.first_end : end, first_key) |
           IntervalBits(seen.begin, seen.end < end ? seen.end : end, first_key);
  }
  const int64_t row = Quotient(q, r.row_length) * r.row_length;
  const int64_t query_block = Quotient(q - row, r.block), first = Quotient(begin - row, r.block);
  const int64_t last_key = r.bidirectional ? r.doc_end[q] : q + 1;
  const int64_t from = begin > first_key ? begin : first_key;
  const int64_t to = last_key < end ? last_key : end;
  uint32_t bits = 0;
  for (int64_t at = from; at < to;) {
    const int64_t block = Quotient(at - row, r.block), block_end = row + (block + 1) * r.block;
    const int64_t stop = block_end < to ? block_end : to;
    if (SeesBlock(r, kv_head, query_block, block, first)) bits |= IntervalBits(at, stop, first_key);
    at = block_end;
  }
  return bits;
}

}  // namespace longspan::ops::mma
