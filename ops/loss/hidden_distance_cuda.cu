// A block adds a fixed range of tokens, one more block the ranges, both in an order that their
// sizes decide.
#include "ops/core/cuda/reduce.cuh"
#include "ops/elementwise/map_cuda.cuh"
#include "ops/loss/hidden_distance_cuda.h"
#include "ops/loss/linear_cross_entropy_cuda.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTokensPerBlock = 32;

// partial [blocks, 2]: squared differences and tokens with a label.
template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    DistanceKernel(int64_t tokens, int64_t width, const T* x, const T* target,
                   const int32_t* labels, double* partial) {
  const int64_t begin = blockIdx.x * kTokensPerBlock;
  const int64_t end = begin + kTokensPerBlock < tokens ? begin + kTokensPerBlock : tokens;
  double sum = 0, valid = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (labels[t] == kNoLabel) continue;
    valid += 1;
    float square = 0;
    for (int64_t d = static_cast<int64_t>(threadIdx.x) * N; d < width; d += kThreads * N) {
      const Pack<T, N> a = PackAt<N>(x, t * width + d), b = PackAt<N>(target, t * width + d);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float apart = static_cast<float>(a.element[j]) - static_cast<float>(b.element[j]);
        square += apart * apart;
      }
    }
    sum += static_cast<double>(square);
  }
  sum = cuda::BlockSum<kThreads>(sum);
  if (threadIdx.x > 0) return;
  partial[2 * blockIdx.x] = sum / static_cast<double>(width);
  partial[2 * blockIdx.x + 1] = valid;
}

__global__ void __launch_bounds__(kThreads)
    AddDistancesKernel(int64_t blocks, const double* partial, double* sums) {
  double loss = 0, valid = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) {
    loss += partial[2 * b];
    valid += partial[2 * b + 1];
  }
  loss = cuda::BlockSum<kThreads>(loss);
  valid = cuda::BlockSum<kThreads>(valid);
  if (threadIdx.x > 0) return;
  sums[kLossSum] = loss;
  sums[kValidSum] = valid;
}

// Rows of `width` elements, a multiple of N.
template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    SlopeKernel(int64_t n, int64_t width, float factor, const T* x, const T* target,
                const int32_t* labels, T* dx) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= n || labels[i / width] == kNoLabel) return;  // stays 0
  const Pack<T, N> a = PackAt<N>(x, i), b = PackAt<N>(target, i);
  float slope[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    slope[j] = factor * (static_cast<float>(a.element[j]) - static_cast<float>(b.element[j]));
  }
  StoreRounded(dx + i, slope);
}

bool WholePacks(const Tensor& x, const Tensor& target) {
  return x.dim(1) % kPackElements == 0 && Aligned16(x.raw()) && Aligned16(target.raw());
}

}  // namespace

Tensor HiddenDistanceForwardCuda(Context& ctx, const Tensor& x, const Tensor& target,
                                 const Tensor& labels, Tensor sums) {
  const int64_t blocks = (x.dim(0) + kTokensPerBlock - 1) / kTokensPerBlock;
  const Tensor partial = ctx.Empty({blocks, 2}, DType::kF64);
  DispatchGpuFloat(x.dtype(), "HiddenDistanceForward", [&]<class T>() {
    cuda::Launch(ctx.cuda(), "HiddenDistanceForward",
                 WholePacks(x, target) ? DistanceKernel<kPackElements, T> : DistanceKernel<1, T>,
                 {dim3(cuda::GridSize(blocks)), dim3(kThreads)}, x.dim(0), x.dim(1), x.data<T>(),
                 target.data<T>(), labels.data<int32_t>(), partial.data<double>());
  });
  cuda::Launch(ctx.cuda(), "AddDistances", AddDistancesKernel, {dim3(1), dim3(kThreads)}, blocks,
               partial.data<double>(), sums.data<double>());
  return sums;
}

Tensor HiddenDistanceBackwardCuda(Context& ctx, const Tensor& x, const Tensor& target,
                                  const Tensor& labels, double scale, Tensor dx) {
  const bool packs = WholePacks(x, target);
  const float factor = static_cast<float>(2 * scale / static_cast<double>(x.dim(1)));
  DispatchGpuFloat(x.dtype(), "HiddenDistanceBackward", [&]<class T>() {
    cuda::Launch(ctx.cuda(), "HiddenDistanceBackward",
                 packs ? SlopeKernel<kPackElements, T> : SlopeKernel<1, T>,
                 cuda::Cover(x.numel(), kThreads, packs ? kPackElements : 1), x.numel(), x.dim(1),
                 factor, x.data<T>(), target.data<T>(), labels.data<int32_t>(), dx.data<T>());
  });
  return dx;
}

}  // namespace longspan::ops::internal
