// A block per row forward. Backward, a block takes kRowsPerPartial rows one after another and keeps
// their share of the weight gradient in shared memory, each thread its own columns; the shares are
// added in row order afterwards, so no sum depends on when a block runs.
#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/reduce.cuh"
#include "ops/elementwise/elementwise.h"
#include "ops/elementwise/map_cuda.cuh"
#include "ops/norm/rms_norm_cuda.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kRowsPerPartial = 32;
constexpr int64_t kMaxWidth = 32768;  // columns whose f32 sums fit the shared memory of sm_80

// Calls f(d) for the packs of N columns that this thread owns; rows consist of whole packs.
template <int N, class F>
__device__ void OwnColumns(int64_t width, F f) {
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * N; d < width; d += kThreads * N) f(d);
}

// 1 / sqrt(mean(row^2) + eps). Squares of finite values can overflow f32: such a row is summed
// again in f64, as on the host.
template <int N, class T>
__device__ float InverseRms(const T* row, int64_t width, double eps) {
  float square = 0;
  OwnColumns<N>(width, [&](int64_t d) {
    const Pack<T, N> in = PackAt<N>(row, d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float x = static_cast<float>(in.element[j]);
      square += x * x;
    }
  });
  square = cuda::BlockSum<kThreads>(square);
  if (isfinite(square)) {
    return 1.0f / sqrtf(square / static_cast<float>(width) + static_cast<float>(eps));
  }
  double wide = 0;
  OwnColumns<N>(width, [&](int64_t d) {
    for (int j = 0; j < N; ++j) {
      const double x = static_cast<double>(static_cast<float>(row[d + j]));
      wide += x * x;
    }
  });
  wide = cuda::BlockSum<kThreads>(wide);
  return static_cast<float>(1.0 / sqrt(wide / static_cast<double>(width) + eps));
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(int64_t width, const T* x, const float* w, double eps, T* y, float* rstd) {
  const int64_t t = blockIdx.x;
  const T* row = x + t * width;
  const float r = InverseRms<N>(row, width, eps);
  if (threadIdx.x == 0) rstd[t] = r;
  OwnColumns<N>(width, [&](int64_t d) {
    const Pack<T, N> in = PackAt<N>(row, d);
    const Pack<float, N> weight = PackAt<N>(w, d);
    Pack<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out.element[j] = static_cast<T>(static_cast<float>(in.element[j]) * r * weight.element[j]);
    }
    PackAt<N>(y + t * width, d) = out;
  });
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(int64_t tokens, int64_t width, const T* dy, const T* x, const float* w,
                   const float* rstd, T* dx, float* partial) {
  LONGSPAN_DYNAMIC_SHARED(shared);
  auto* sums = reinterpret_cast<float*>(shared);  // [width]; a thread uses its own columns only
  OwnColumns<N>(width, [&](int64_t d) { PackAt<N>(sums, d) = Pack<float, N>{}; });
  const int64_t begin = blockIdx.x * kRowsPerPartial;
  const int64_t end = begin + kRowsPerPartial < tokens ? begin + kRowsPerPartial : tokens;
  for (int64_t t = begin; t < end; ++t) {
    const T *row = x + t * width, *drow = dy + t * width;
    const float r = rstd[t];
    float dot = 0;
    OwnColumns<N>(width, [&](int64_t d) {
      const Pack<T, N> in = PackAt<N>(row, d), g = PackAt<N>(drow, d);
      const Pack<float, N> weight = PackAt<N>(w, d);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dot += static_cast<float>(g.element[j]) * weight.element[j] *
               (static_cast<float>(in.element[j]) * r);
      }
    });
    const float mean = cuda::BlockSum<kThreads>(dot) / static_cast<float>(width);
    OwnColumns<N>(width, [&](int64_t d) {
      const Pack<T, N> in = PackAt<N>(row, d), g = PackAt<N>(drow, d);
      const Pack<float, N> weight = PackAt<N>(w, d);
      Pack<float, N> sum = PackAt<N>(sums, d);
      Pack<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float slope = static_cast<float>(g.element[j]);
        const float xhat = static_cast<float>(in.element[j]) * r;
        sum.element[j] += slope * xhat;
        out.element[j] = static_cast<T>(r * (slope * weight.element[j] - xhat * mean));
      }
      PackAt<N>(sums, d) = sum;
      PackAt<N>(dx + t * width, d) = out;
    });
  }
  OwnColumns<N>(
      width, [&](int64_t d) { PackAt<N>(partial + blockIdx.x * width, d) = PackAt<N>(sums, d); });
}

}  // namespace

RmsNormResult RmsNormForwardCuda(Context& ctx, const Tensor& x, const Tensor& w, double eps,
                                 RmsNormResult out) {
  const int64_t tokens = x.dim(0), width = x.dim(1);
  DispatchGpuFloat(x.dtype(), "RmsNormForward", [&]<class T>() {
    const cuda::LaunchShape shape{dim3(static_cast<unsigned>(tokens)), dim3(kThreads)};
    // Whole packs need rows that start at 16 bytes.
    const bool packs = width % kPackElements == 0 && Aligned16(x.raw()) && Aligned16(w.raw());
    const auto kernel = packs ? ForwardKernel<kPackElements, T> : ForwardKernel<1, T>;
    cuda::Launch(ctx.cuda(), "RmsNormForward", kernel, shape, width, x.data<T>(), w.data<float>(),
                 eps, out.y.data<T>(), out.rstd.data<float>());
  });
  return out;
}

Tensor RmsNormBackwardCuda(Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& w,
                           const Tensor& rstd, Tensor& dw) {
  const int64_t tokens = x.dim(0), width = x.dim(1);
  if (width > kMaxWidth) {
    throw Unsupported(Str("RmsNormBackward: width ", width, " is above ", kMaxWidth, " on a GPU"));
  }
  const int64_t partials = (tokens + kRowsPerPartial - 1) / kRowsPerPartial;
  const Tensor dx = ctx.Empty(x.shape(), x.dtype());
  const Tensor partial = ctx.Empty({partials, width}, DType::kF32);
  DispatchGpuFloat(x.dtype(), "RmsNormBackward", [&]<class T>() {
    const cuda::LaunchShape shape{dim3(static_cast<unsigned>(partials)), dim3(kThreads),
                                  static_cast<size_t>(width) * sizeof(float)};
    const bool packs = width % kPackElements == 0 && Aligned16(dy.raw()) && Aligned16(x.raw()) &&
                       Aligned16(w.raw());
    const auto kernel = packs ? BackwardKernel<kPackElements, T> : BackwardKernel<1, T>;
    cuda::Launch(ctx.cuda(), "RmsNormBackward", kernel, shape, tokens, width, dy.data<T>(),
                 x.data<T>(), w.data<float>(), rstd.data<float>(), dx.data<T>(),
                 partial.data<float>());
  });
  if (dw.defined()) AddRowsInto(ctx, dw, partial);
  return dx;
}

}  // namespace longspan::ops::internal
