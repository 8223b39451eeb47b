// Row sums of d_out * o, and the merge of partial results. A row belongs to a power of two of lanes
// of one warp, 8 elements each at a time, so that the order of a sum depends on head_dim alone.
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/merge.h"
#include "ops/core/cuda/launch.h"
#include "ops/elementwise/map_cuda.cuh"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256, kWarpLanes = 32;

// Lanes of one row when each takes n elements at a time.
int LanesPerRow(int64_t dim, int n) {
  int lanes = 1;
  while (lanes < kWarpLanes && lanes * n < dim) lanes *= 2;
  return lanes;
}

cuda::LaunchShape CoverRows(int64_t rows, int lanes) { return cuda::Cover(rows * lanes, kThreads); }

// Runs whole warps to the end, rows past the last one as the last: a sum needs all lanes.
template <int N, class O, class D>
__global__ void __launch_bounds__(kThreads)
    DeltaKernel(int64_t rows, int64_t dim, int lanes, const O* o, const D* d_out, float* delta) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int lane = static_cast<int>(thread % lanes);
  const int64_t row = thread / lanes, at = (row < rows ? row : rows - 1) * dim;
  float sum = 0;
  for (int64_t d = lane * N; d < dim; d += lanes * N) {
    const Pack<O, N> a = PackAt<N>(o, at + d);
    const Pack<D, N> b = PackAt<N>(d_out, at + d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum += static_cast<float>(a.element[j]) * static_cast<float>(b.element[j]);
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (lane == 0 && row < rows) delta[row] = sum;
}

template <int N>
__global__ void __launch_bounds__(kThreads)
    MergeKernel(int64_t rows, int64_t dim, int lanes, float* o, float* lse, const float* o2,
                const float* lse2) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int lane = static_cast<int>(thread % lanes);
  const int64_t row = thread / lanes;
  const bool inside = row < rows;
  MergeWeights<float> w{};
  if (inside) w = WeightsOfParts(lse[row], lse2[row]);
  __syncwarp();  // all lanes of the row have read lse
  if (!inside) return;
  for (int64_t d = lane * N; d < dim; d += lanes * N) {
    Pack<float, N>& to = PackAt<N>(o, row * dim + d);
    const Pack<float, N> a = to, b = PackAt<N>(o2, row * dim + d);
    Pack<float, N> merged;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      merged.element[j] = w.empty ? 0.0f : w.a * a.element[j] + w.b * b.element[j];
    }
    to = merged;
  }
  if (lane == 0) lse[row] = w.lse;
}

}  // namespace

Tensor AttentionDeltaCuda(Context& ctx, const Tensor& d_out, const Tensor& o, Tensor delta) {
  const int64_t rows = delta.numel(), dim = o.dim(2);
  const bool packs = dim % kPackElements == 0 && Aligned16(o.raw()) && Aligned16(d_out.raw());
  const int lanes = LanesPerRow(dim, packs ? kPackElements : 1);
  DispatchGpuFloat(o.dtype(), "AttentionDelta", [&]<class O>() {
    DispatchGpuFloat(d_out.dtype(), "AttentionDelta", [&]<class D>() {
      const auto kernel = packs ? DeltaKernel<kPackElements, O, D> : DeltaKernel<1, O, D>;
      cuda::Launch(ctx.cuda(), "AttentionDelta", kernel, CoverRows(rows, lanes), rows, dim, lanes,
                   o.data<O>(), d_out.data<D>(), delta.data<float>());
    });
  });
  return delta;
}

void MergePartialCuda(Context& ctx, Tensor& o, Tensor& lse, const Tensor& o2, const Tensor& lse2) {
  if (o.dtype() != DType::kF32) {
    throw Unsupported("MergePartial: f64 is not built for GPUs; use f32");
  }
  constexpr int kPack = 4;  // 16 bytes
  const int64_t rows = lse.numel(), dim = o.dim(2);
  const bool packs = dim % kPack == 0 && Aligned16(o.raw()) && Aligned16(o2.raw());
  const int lanes = LanesPerRow(dim, packs ? kPack : 1);
  cuda::Launch(ctx.cuda(), "MergePartial", packs ? MergeKernel<kPack> : MergeKernel<1>,
               CoverRows(rows, lanes), rows, dim, lanes, o.data<float>(), lse.data<float>(),
               o2.data<float>(), lse2.data<float>());
}

}  // namespace longspan::ops::internal
