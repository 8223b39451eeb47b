#pragma once
#include <algorithm>
#include <cstdint>

#include "ops/attention/cuda/device_mask.h"
#include "ops/attention/cuda/device_routed.h"
#include "ops/attention/cuda/reference_softmax.cuh"
#include "ops/attention/routed_arguments.h"
#include "ops/core/cuda/launch.h"
#include "ops/core/device_code.h"

// What the kernels of routed attention share: the tiles of reference_tile.cuh with gathered query
// rows.
namespace longspan::ops::reference_cuda {

// Rows of a [T, heads, D] tensor by their numbers token * heads + head. Reads 0 past the last.
struct GatheredRows {
  const void* data;
  bool bf16;
  const int64_t* numbers;  // in shared memory
  int count, dim;
  __device__ float At(int r, int d) const {
    if (r >= count || d >= dim) return 0;
    const int64_t i = numbers[r] * dim + d;
    return bf16 ? static_cast<float>(static_cast<const BF16*>(data)[i])
                : static_cast<const float*>(data)[i];
  }
};

// Shared memory of a block.
struct RoutedShared {
  Shared tiles;
  int64_t numbers[kTile];  // of the gathered rows
};

struct RoutedProblem {
  DeviceRoutedBlocks blocks;
  const RoutedQueries::Range* ranges;  // of stretches of DeviceRoutedQueries::kStretch rows
  DeviceKvTable keys;                  // by routed blocks
  const int64_t* offsets;
  const int32_t* query_rows;
  const void *q, *k, *v;
  bool bf16;  // their dtype
  int64_t rows, heads, group, kv_heads;
  int64_t segment;  // rows of one head that a block of threads owns; whole stretches
  int dim;
  float scale;

  LONGSPAN_HD int64_t segments() const { return (rows + segment - 1) / segment; }
  // What a block of threads owns of the query rows, those of the last segment first: later tokens
  // have more blocks to choose from.
  struct Share {
    int64_t head, kv_head, segment;
  };
  __device__ Share RowsOf(int64_t block) const {
    const int64_t head = block % heads;
    return {head, head / group, segments() - 1 - block / heads};
  }
  __device__ GatheredRows Gathered(const void* data, bool is_bf16, const int64_t* numbers,
                                   int count) const {
    return {data, is_bf16, numbers, count, dim};
  }
  // Keys [first, first + count) of a block that starts at element `offset`.
  __device__ RowBlock Keys(const void* data, int64_t offset, int64_t first, int count) const {
    return {data, bf16, offset + first * keys.token_stride, keys.token_stride, count, dim};
  }
  __device__ int64_t TokensOf(int64_t block) const {
    return blocks.begin[block + 1] - blocks.begin[block];
  }
  // First of the list's entries [begin, end) that is not below `row`.
  __device__ int64_t FirstFrom(int64_t begin, int64_t end, int64_t row) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (query_rows[middle] < row) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
  // Numbers of rows [at, at + count) of a list of `head`; all threads call it, none reads the
  // former numbers any more.
  __device__ void LoadNumbers(int64_t at, int count, int64_t head, int64_t* numbers) const {
    if (threadIdx.x < static_cast<unsigned>(count)) {
      numbers[threadIdx.x] = query_rows[at + threadIdx.x] * heads + head;
    }
    __syncthreads();
  }

  // Calls visit(key block, place of the first row, rows) for up to 64 rows of the segment at a
  // time, key blocks ascending.
  template <class Visit>
  __device__ void ForEachTile(int64_t segment_index, int64_t head, const Visit& visit) const {
    const int64_t first_row = segment_index * segment;
    const int64_t end_row = std::min(rows, first_row + segment);
    RoutedQueries::Range range = ranges[first_row / DeviceRoutedQueries::kStretch];
    for (int64_t row = first_row + DeviceRoutedQueries::kStretch; row < end_row;
         row += DeviceRoutedQueries::kStretch) {
      const RoutedQueries::Range other = ranges[row / DeviceRoutedQueries::kStretch];
      range = {std::min(range.first, other.first), std::max(range.last, other.last)};
    }
    for (int64_t b = range.first; b < range.last; ++b) {
      const int64_t list = b * heads + head;
      const int64_t list_end = offsets[list + 1];
      const int64_t begin = FirstFrom(offsets[list], list_end, first_row);
      const int64_t end = FirstFrom(begin, list_end, end_row);
      for (int64_t at = begin; at < end; at += kTile) {
        visit(b, at, static_cast<int>(std::min<int64_t>(kTile, end - at)));
      }
    }
  }
};

// Of `blocks` blocks of threads.
inline cuda::LaunchShape RoutedLaunch(int64_t blocks) {
  return {dim3(cuda::GridSize(blocks)), dim3(kThreads), sizeof(RoutedShared)};
}

// Lists of one segment fill a tile on average, where tokens have many blocks to choose from.
inline int64_t SegmentRows(const RoutedQueries& queries, int64_t width) {
  constexpr int64_t kSmallest = 256;
  static_assert(kTile % DeviceRoutedQueries::kStretch == 0);
  const int64_t wanted = kTile * queries.most_candidates / width;
  return (std::max(kSmallest, wanted) + kTile - 1) / kTile * kTile;
}

template <class Args>
RoutedProblem MakeRoutedProblem(Context& ctx, const Args& args) {
  return {.blocks = OnDevice(ctx, args.blocks),
          .ranges = OnDevice(ctx, args.queries).ranges,
          .keys = OnDevice(ctx, *args.kv.table),
          .offsets = args.lists.offsets.template data<int64_t>(),
          .query_rows = args.lists.query_rows.template data<int32_t>(),
          .q = args.q.raw(),
          .k = args.kv.k.raw(),
          .v = args.kv.v.raw(),
          .bf16 = args.q.dtype() == DType::kBF16,
          .rows = args.q.dim(0),
          .heads = args.q.dim(1),
          .group = args.q.dim(1) / args.kv.kv_heads(),
          .kv_heads = args.kv.kv_heads(),
          .segment = SegmentRows(args.queries, args.lists.width),
          .dim = static_cast<int>(args.q.dim(2)),
          .scale = static_cast<float>(args.scale)};
}

}  // namespace longspan::ops::reference_cuda
