#pragma once
#include <cstdint>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// A selection of key blocks per (query row, query head), from both sides. Selections of single
// tokens do not form tiles of neighbouring queries, so kernels take a key block and the rows that
// chose it.
//
// Shapes    selected [heads, rows, width]: the chosen blocks ascending, then -1 up to `width`
//           offsets [blocks * heads + 1]: list (b, h) is query_rows[offsets[b * heads + h] ..
//           offsets[b * heads + h + 1]), so that the lists of a key block's neighbouring heads
//           follow each other
//           query_rows [heads * rows * width]: the rows of every list, ascending; what lies after
//           the last list is unwritten
// Dtypes    selected, query_rows i32; offsets i64
// Devices   cpu, cuda: all three are on the device of the Context that built them
struct RoutedLists {
  int64_t rows = 0, heads = 0, blocks = 0, width = 0;
  Tensor selected, offsets, query_rows;
};

// The lists of `selected`: histogram, prefix sum, fill. O(heads * rows * width) time, the same
// result for any number of threads.
//
// Memory    beside the result, counters of at most 8 heads * (rows * width + blocks) bytes; on a
//           CPU fewer, and not of the Context
// Errors    InvalidArgument unless selected is i32 [heads, rows, width] with fewer than 2^31 rows
//           and blocks >= 0. Entries must be -1 or below `blocks`; on a CPU any other is
//           InvalidArgument as well.
RoutedLists BuildRoutedLists(Context& ctx, const Tensor& selected, int64_t blocks);

// Which blocks anybody chose, by groups of neighbouring heads: u8 [groups, ceil(blocks / 8)]. Bit b
// % 8 of byte b / 8 is set when some head of the group has a list of block b that is not empty.
//
// Errors    InvalidArgument unless the heads are a multiple of `groups`
Tensor ListedBlocks(Context& ctx, const RoutedLists& lists, int64_t groups);

}  // namespace longspan::ops
