#include "ops/elementwise/map_cuda.cuh"
#include "ops/rope/rope_cuda.h"

namespace longspan::ops::internal {
namespace {

// A thread turns N neighbouring pairs of one head.
template <int N, class T>
__global__ void RotateKernel(int64_t threads, int64_t heads, int64_t half, const T* x,
                             const float* cosines, const float* sines, float direction, T* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= threads) return;
  const int64_t runs = half / N;  // per head
  const int64_t row = i / runs, pair = i % runs * N, token = row / heads;
  const int64_t low = row * 2 * half + pair, high = low + half, angle = token * half + pair;
  const Pack<T, N> a = PackAt<N>(x, low), b = PackAt<N>(x, high);
  const Pack<float, N> c = PackAt<N>(cosines, angle), s = PackAt<N>(sines, angle);
  float turned_a[N], turned_b[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float p = static_cast<float>(a.element[j]), q = static_cast<float>(b.element[j]);
    const float cosine = c.element[j], sine = direction * s.element[j];
    turned_a[j] = p * cosine - q * sine;
    turned_b[j] = q * cosine + p * sine;
  }
  StoreRounded(y + low, turned_a);
  StoreRounded(y + high, turned_b);
}

}  // namespace

Tensor RotateCuda(Context& ctx, const char* op, const Tensor& x, const RopeTable& table,
                  int direction, Tensor y) {
  const int64_t heads = x.dim(1), half = x.dim(2) / 2;
  const bool packs = half % kPackElements == 0 && Aligned16(x.raw()) && Aligned16(y.raw()) &&
                     Aligned16(table.cos.raw()) && Aligned16(table.sin.raw());
  const int64_t threads = x.numel() / 2 / (packs ? kPackElements : 1);
  DispatchGpuFloat(x.dtype(), op, [&]<class T>() {
    const auto kernel = packs ? RotateKernel<kPackElements, T> : RotateKernel<1, T>;
    cuda::Launch(ctx.cuda(), op, kernel, cuda::Cover(threads), threads, heads, half, x.data<T>(),
                 table.cos.data<float>(), table.sin.data<float>(), static_cast<float>(direction),
                 y.data<T>());
  });
  return y;
}

}  // namespace longspan::ops::internal
