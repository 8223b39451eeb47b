#pragma once
#include <algorithm>
#include <cstdint>

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
  const int64_t* offsets;
  const int32_t* query_rows;
  const void *q, *k, *v;
  bool bf16;  // their dtype
  int64_t tokens, heads, group, kv_heads;
  int64_t segment;  // tokens whose rows of one head a block of threads owns
  int dim;
  float scale;

  LONGSPAN_HD int64_t segments() const { return (tokens + segment - 1) / segment; }
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
  __device__ RowBlock Keys(const void* data, int64_t kv_head, int64_t token, int count) const {
    return {data, bf16, (token * kv_heads + kv_head) * dim, kv_heads * dim, count, dim};
  }
  // First of the list's rows [begin, end) that is not below `token`.
  __device__ int64_t FirstFrom(int64_t begin, int64_t end, int64_t token) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (query_rows[middle] < token) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
  __device__ int64_t BlockOf(int64_t token) const {
    int64_t low = 0, high = blocks.count;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (blocks.begin[middle] <= token) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
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
    const int64_t first_token = segment_index * segment;
    const int64_t end_token = std::min(tokens, first_token + segment);
    const int64_t last = BlockOf(end_token - 1);
    for (int64_t b = blocks.first_candidate[BlockOf(first_token)]; b < last; ++b) {
      const int64_t list = b * heads + head;
      const int64_t list_end = offsets[list + 1];
      const int64_t begin = FirstFrom(offsets[list], list_end, first_token);
      const int64_t end = FirstFrom(begin, list_end, end_token);
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
inline int64_t SegmentTokens(const RoutedBlocks& blocks, int64_t width) {
  constexpr int64_t kSmallest = 256;
  const int64_t wanted = kTile * blocks.MostCandidates() / width;
  return (std::max(kSmallest, wanted) + kTile - 1) / kTile * kTile;
}

template <class Args>
RoutedProblem MakeRoutedProblem(Context& ctx, const Args& args) {
  return {.blocks = OnDevice(ctx, args.blocks),
          .offsets = args.lists.offsets.template data<int64_t>(),
          .query_rows = args.lists.query_rows.template data<int32_t>(),
          .q = args.q.raw(),
          .k = args.k.raw(),
          .v = args.v.raw(),
          .bf16 = args.q.dtype() == DType::kBF16,
          .tokens = args.q.dim(0),
          .heads = args.q.dim(1),
          .group = args.q.dim(1) / args.k.dim(1),
          .kv_heads = args.k.dim(1),
          .segment = SegmentTokens(args.blocks, args.lists.width),
          .dim = static_cast<int>(args.q.dim(2)),
          .scale = static_cast<float>(args.scale)};
}

}  // namespace longspan::ops::reference_cuda
