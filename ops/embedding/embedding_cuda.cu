// Backward: the pieces of EmbeddingOrder are summed token after token; ids of one piece go straight
// to the table, the others leave partial sums, which are then added in order. A row of the table is
// written by one block, so every sum has one order, whatever the grid does.
#include <algorithm>

#include "ops/elementwise/map_cuda.cuh"
#include "ops/embedding/embedding_cuda.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 128;

// A block per token; a thread moves N neighbouring columns at a time.
template <int N, class From, class To>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(int64_t width, int64_t vocab, const int32_t* ids, const From* table, To* y) {
  const int64_t t = blockIdx.x, id = ids[t];
  const bool known = id >= 0 && id < vocab;
  const From* row = table + (known ? id : 0) * width;
  To* to = y + t * width;
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * N; d < width; d += kThreads * N) {
    Pack<From, N> in{};
    if (known) in = PackAt<N>(row, d);
    float out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = known ? static_cast<float>(in.element[j]) : NAN;
    StoreRounded(to + d, out);
  }
}

// A piece a block row: begin, end, target.
template <class T>
__global__ void __launch_bounds__(kThreads)
    PieceKernel(int64_t width, const int32_t* tokens, const int32_t* pieces, const T* dy,
                float* partial, float* dtable) {
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (d >= width) return;
  const int32_t* piece = pieces + int64_t{3} * blockIdx.x;
  const int32_t end = piece[1], target = piece[2];
  float sum = 0;
#pragma unroll 4
  for (int32_t p = piece[0]; p < end; ++p) {
    sum += static_cast<float>(dy[static_cast<int64_t>(tokens[p]) * width + d]);
  }
  if (target >= 0) {
    dtable[static_cast<int64_t>(target) * width + d] += sum;
  } else {
    partial[static_cast<int64_t>(-1 - target) * width + d] = sum;
  }
}

// An id of several pieces a block row: row of the table, first slot, slots.
__global__ void __launch_bounds__(kThreads)
    JoinKernel(int64_t width, const int32_t* joins, const float* partial, float* dtable) {
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (d >= width) return;
  const int32_t* join = joins + int64_t{3} * blockIdx.x;
  const float* from = partial + static_cast<int64_t>(join[1]) * width + d;
  float sum = 0;
#pragma unroll 4
  for (int32_t s = 0; s < join[2]; ++s) sum += from[s * width];
  dtable[static_cast<int64_t>(join[0]) * width + d] += sum;
}

cuda::LaunchShape RowsOf(const Tensor& triples, int64_t width) {
  return {dim3(cuda::GridSize(triples.dim(0)), cuda::GridSize((width + kThreads - 1) / kThreads)),
          dim3(kThreads)};
}

}  // namespace

Tensor EmbeddingForwardCuda(Context& ctx, const Tensor& ids, const Tensor& table, Tensor y) {
  const int64_t width = table.dim(1);
  const bool packs = width % kPackElements == 0 && Aligned16(table.raw()) && Aligned16(y.raw());
  DispatchGpuFloat(table.dtype(), "EmbeddingForward", [&]<class From>() {
    DispatchGpuFloat(y.dtype(), "EmbeddingForward", [&]<class To>() {
      const auto kernel =
          packs ? ForwardKernel<kPackElements, From, To> : ForwardKernel<1, From, To>;
      cuda::Launch(ctx.cuda(), "EmbeddingForward", kernel,
                   {dim3(cuda::GridSize(ids.dim(0))), dim3(kThreads)}, width, table.dim(0),
                   ids.data<int32_t>(), table.data<From>(), y.data<To>());
    });
  });
  return y;
}

void EmbeddingBackwardCuda(Context& ctx, const EmbeddingOrder& order, const Tensor& dy,
                           Tensor& dtable) {
  const int64_t width = dtable.dim(1);
  const Tensor partial = ctx.Empty({order.slots, width}, DType::kF32);
  DispatchGpuFloat(dy.dtype(), "EmbeddingBackward", [&]<class T>() {
    cuda::Launch(ctx.cuda(), "EmbeddingBackward", PieceKernel<T>, RowsOf(order.pieces, width),
                 width, order.tokens.data<int32_t>(), order.pieces.data<int32_t>(), dy.data<T>(),
                 partial.data<float>(), dtable.data<float>());
  });
  cuda::Launch(ctx.cuda(), "EmbeddingBackward", JoinKernel, RowsOf(order.joins, width), width,
               order.joins.data<int32_t>(), partial.data<float>(), dtable.data<float>());
}

}  // namespace longspan::ops::internal
