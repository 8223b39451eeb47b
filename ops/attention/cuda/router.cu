// Mean keys, and the choice of blocks: gates by tiles of 64 queries and 64 blocks, of which each
// query's thread keeps the largest.
#include <algorithm>
#include <cmath>

#include "ops/attention/cuda/device_routed.h"
#include "ops/attention/cuda/reference_tile.cuh"
#include "ops/attention/cuda/routed_cuda.h"
#include "ops/core/cuda/launch.h"

namespace longspan::ops::internal {
namespace {

using namespace reference_cuda;

constexpr int kMeanThreads = 128;

// A block of threads per (part of a key block, kv head); each sums its elements over the tokens in
// order.
__global__ void __launch_bounds__(kMeanThreads)
    MeanKernel(DeviceRoutedBlocks blocks, DeviceRoutedShare share, const void* k, bool bf16,
               int64_t kv_heads, int dim, float* means) {
  const int64_t part = blockIdx.x / kv_heads, head = blockIdx.x % kv_heads;
  const int64_t begin = share.begin[part], end = share.begin[part + 1];
  const int32_t block = share.block[part];
  const float weight = 1.0f / static_cast<float>(blocks.begin[block + 1] - blocks.begin[block]);
  for (int d = static_cast<int>(threadIdx.x); d < dim; d += kMeanThreads) {
    float sum = 0;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = (t * kv_heads + head) * dim + d;
      sum += bf16 ? static_cast<float>(static_cast<const BF16*>(k)[at])
                  : static_cast<const float*>(k)[at];
    }
    means[(part * kv_heads + head) * dim + d] = sum * weight;
  }
}

struct RouteProblem {
  DeviceRoutedQueries queries;
  const void* q;
  bool bf16;
  const float* means;
  int32_t* selected;  // [heads, rows, width]
  float* kept;        // the same: gates of what is in `selected`, in descending order
  int64_t rows, heads, kv_heads, width;
  int dim;
};

// The blocks chosen so far by one query, which one thread owns.
struct Best {
  int32_t* block;
  float* gate;
  int64_t width, filled;
  __device__ void Offer(int32_t number, float value) {
    if (value != value) value = INFINITY;  // NaN
    if (filled == width && value <= gate[width - 1]) return;
    int64_t at = filled < width ? filled++ : width - 1;
    for (; at > 0 && gate[at - 1] < value; --at) {
      gate[at] = gate[at - 1];
      block[at] = block[at - 1];
    }
    gate[at] = value;
    block[at] = number;
  }
  __device__ void SortByBlock() {
    for (int64_t i = 1; i < filled; ++i) {
      const int32_t number = block[i];
      int64_t at = i;
      for (; at > 0 && block[at - 1] > number; --at) block[at] = block[at - 1];
      block[at] = number;
    }
    for (int64_t i = filled; i < width; ++i) block[i] = -1;
  }
};

// A block of threads per (tile of queries, head).
__global__ void __launch_bounds__(kThreads, 2) RouteKernel(RouteProblem p) {
  LONGSPAN_DYNAMIC_SHARED(dynamic);
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  const RoutedTile tile = p.queries.tiles[blockIdx.x / p.heads];
  const int64_t head = blockIdx.x % p.heads, kv_head = head / (p.heads / p.kv_heads);
  const RowBlock q{p.q,         p.bf16, (tile.begin * p.heads + head) * p.dim, p.heads * p.dim,
                   tile.tokens, p.dim};
  const int row = static_cast<int>(threadIdx.x);
  const bool owner = row < tile.tokens;
  const int64_t at = (head * p.rows + tile.begin + (owner ? row : 0)) * p.width;
  Best best{p.selected + at, p.kept + at, p.width, 0};
  for (int64_t done = 0; done < tile.candidates; done += kTile) {
    const int64_t first = tile.first + done;
    const int n = static_cast<int>(std::min<int64_t>(kTile, tile.candidates - done));
    const RowBlock means{p.means, false, (first * p.kv_heads + kv_head) * p.dim, p.kv_heads * p.dim,
                         n,       p.dim};
    float gates[kOwn][kOwn] = {};
    if (tile.candidates > p.width) ScoreProduct(q, means, shared, gates);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        shared.tile[(ThreadY() * kOwn + i) * kLd + ThreadX() * kOwn + j] = gates[i][j];
      }
    }
    __syncthreads();
    if (owner) {
      for (int b = 0; b < n; ++b) {
        best.Offer(static_cast<int32_t>(first + b), shared.tile[row * kLd + b]);
      }
    }
    __syncthreads();
  }
  if (owner) best.SortByBlock();
}

}  // namespace

void BlockMeansCuda(Context& ctx, const Tensor& k, const RoutedBlocks& blocks,
                    const RoutedShare& share, const Tensor& means) {
  const int64_t kv_heads = k.dim(1);
  cuda::Launch(ctx.cuda(), "BlockMeans", MeanKernel,
               {dim3(cuda::GridSize(share.count() * kv_heads)), dim3(kMeanThreads)},
               OnDevice(ctx, blocks), OnDevice(ctx, share), k.raw(), k.dtype() == DType::kBF16,
               kv_heads, static_cast<int>(k.dim(2)), means.data<float>());
}

void RouteCuda(Context& ctx, const RouteArgs& args) {
  const Tensor kept = ctx.Empty(args.selected.shape(), DType::kF32);
  const RouteProblem p{.queries = OnDevice(ctx, args.queries),
                       .q = args.q.raw(),
                       .bf16 = args.q.dtype() == DType::kBF16,
                       .means = args.means.data<float>(),
                       .selected = args.selected.data<int32_t>(),
                       .kept = kept.data<float>(),
                       .rows = args.q.dim(0),
                       .heads = args.q.dim(1),
                       .kv_heads = args.means.dim(1),
                       .width = args.selected.dim(2),
                       .dim = static_cast<int>(args.q.dim(2))};
  cuda::Launch(
      ctx.cuda(), "MobaSelect", RouteKernel,
      {dim3(cuda::GridSize(p.queries.tile_count * p.heads)), dim3(kThreads), sizeof(Shared)}, p);
}

}  // namespace longspan::ops::internal
