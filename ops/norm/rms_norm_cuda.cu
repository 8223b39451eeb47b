// Forward, a warp takes a row of up to 2048 columns and a block a longer one. Backward, a block
// takes several rows one after another and keeps their share of the weight gradient in shared
// memory, each thread its own columns; the shares are added in row order afterwards, so no sum
// depends on when a block runs. Rows that fit stay in registers between their sum and their result.
#include <algorithm>

#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/reduce.cuh"
#include "ops/elementwise/elementwise.h"
#include "ops/elementwise/map_cuda.cuh"
#include "ops/norm/rms_norm_cuda.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxPartials = 528;  // 4 for each processor of an H100; constant, as the bits are
constexpr int64_t kMaxWidth = 32768;   // columns whose f32 sums fit the shared memory of sm_80
constexpr int64_t kWarpWidth = 2048, kWarpHeld = kWarpWidth / (cuda::kWarp * kPackElements);
constexpr int64_t kBlockWidth = 8192, kBlockHeld = kBlockWidth / (kThreads * kPackElements);

// Calls f(i, d) for the packs of N columns that this thread owns, i counting them; rows consist of
// whole packs and have kRowThreads threads. There are at most kHeld of them, or any number when
// that is 0, and i is 0.
template <int N, int kHeld, int kRowThreads, class F>
__device__ void OwnColumns(int64_t width, F f) {
  const int64_t begin = static_cast<int64_t>(threadIdx.x % kRowThreads) * N;
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t d = begin + i * (kRowThreads * N);
      if (d < width) f(i, d);
    }
  } else {
    for (int64_t d = begin; d < width; d += kRowThreads * N) f(0, d);
  }
}

// The own columns of a row: in registers, or read whenever they are asked for.
template <int N, int kHeld, int kRowThreads, class T>
struct Row {
  const T* data;
  Pack<T, N> held[kHeld > 0 ? kHeld : 1];

  __device__ Row(const T* row, int64_t width) : data(row) {
    if constexpr (kHeld > 0) {
      OwnColumns<N, kHeld, kRowThreads>(width,
                                        [&](int i, int64_t d) { held[i] = PackAt<N>(data, d); });
    }
  }
  __device__ Pack<T, N> At(int i, int64_t d) const {
    if constexpr (kHeld > 0) {
      return held[i];
    } else {
      return PackAt<N>(data, d);
    }
  }
};

template <int kRowThreads, class Sum>
__device__ Sum RowSum(Sum value) {
  if constexpr (kRowThreads == cuda::kWarp) {
    return cuda::WarpSum(value);
  } else {
    return cuda::BlockSum<kRowThreads>(value);
  }
}

// 1 / sqrt(mean(row^2) + eps). Squares of finite values can overflow f32: such a row is summed
// again in f64, as on the host.
template <int N, int kHeld, int kRowThreads, class T>
__device__ float InverseRms(const Row<N, kHeld, kRowThreads, T>& row, int64_t width, double eps) {
  float square = 0;
  OwnColumns<N, kHeld, kRowThreads>(width, [&](int i, int64_t d) {
    const Pack<T, N> in = row.At(i, d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float x = static_cast<float>(in.element[j]);
      square += x * x;
    }
  });
  square = RowSum<kRowThreads>(square);
  if (isfinite(square)) {
    return 1.0f / sqrtf(square / static_cast<float>(width) + static_cast<float>(eps));
  }
  double wide = 0;
  for (int64_t d = threadIdx.x % kRowThreads; d < width; d += kRowThreads) {
    const double x = static_cast<double>(static_cast<float>(row.data[d]));
    wide += x * x;
  }
  wide = RowSum<kRowThreads>(wide);
  return static_cast<float>(1.0 / sqrt(wide / static_cast<double>(width) + eps));
}

template <int N, int kHeld, int kRowThreads, class T>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(int64_t tokens, int64_t width, const T* x, const float* w, double eps, T* y,
                  float* rstd) {
  constexpr int kRows = kThreads / kRowThreads;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kRowThreads;
  if (t >= tokens) return;  // whole warps
  const Row<N, kHeld, kRowThreads, T> row(x + t * width, width);
  const float r = InverseRms(row, width, eps);
  if (threadIdx.x % kRowThreads == 0) rstd[t] = r;
  OwnColumns<N, kHeld, kRowThreads>(width, [&](int i, int64_t d) {
    const Pack<T, N> in = row.At(i, d);
    const Pack<float, N> weight = PackAt<N>(w, d);
    float out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out[j] = static_cast<float>(in.element[j]) * r * weight.element[j];
    }
    StoreRounded(y + t * width + d, out);
  });
}

template <int N, int kHeld, class T>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(int64_t tokens, int64_t rows, int64_t width, const T* dy, const T* x,
                   const float* w, const float* rstd, T* dx, float* partial) {
  LONGSPAN_DYNAMIC_SHARED(shared);
  auto* sums = reinterpret_cast<float*>(shared);  // [width]; a thread uses its own columns only
  const auto own_columns = [&](auto f) { OwnColumns<N, kHeld, kThreads>(width, f); };
  own_columns([&](int, int64_t d) { PackAt<N>(sums, d) = Pack<float, N>{}; });
  const int64_t begin = blockIdx.x * rows, end = begin + rows < tokens ? begin + rows : tokens;
  for (int64_t t = begin; t < end; ++t) {
    const Row<N, kHeld, kThreads, T> row(x + t * width, width), drow(dy + t * width, width);
    const float r = rstd[t];
    float dot = 0;
    own_columns([&](int i, int64_t d) {
      const Pack<T, N> in = row.At(i, d), g = drow.At(i, d);
      const Pack<float, N> weight = PackAt<N>(w, d);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dot += static_cast<float>(g.element[j]) * weight.element[j] *
               (static_cast<float>(in.element[j]) * r);
      }
    });
    const float mean = cuda::BlockSum<kThreads>(dot) / static_cast<float>(width);
    own_columns([&](int i, int64_t d) {
      const Pack<T, N> in = row.At(i, d), g = drow.At(i, d);
      const Pack<float, N> weight = PackAt<N>(w, d);
      Pack<float, N> sum = PackAt<N>(sums, d);
      float out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float slope = static_cast<float>(g.element[j]);
        const float xhat = static_cast<float>(in.element[j]) * r;
        sum.element[j] += slope * xhat;
        out[j] = r * (slope * weight.element[j] - xhat * mean);
      }
      PackAt<N>(sums, d) = sum;
      StoreRounded(dx + t * width + d, out);
    });
  }
  own_columns([&](int, int64_t d) {
    const Pack<float, N> sum = PackAt<N>(sums, d);
    PackAt<N>(partial + blockIdx.x * width, d) = sum;
  });
}

void CheckWidth(const char* op, int64_t width) {
  if (width <= kMaxWidth) return;
  throw Unsupported(Str(op, ": width ", width, " is above ", kMaxWidth, " on a GPU"));
}

}  // namespace

RmsNormResult RmsNormForwardCuda(Context& ctx, const Tensor& x, const Tensor& w, double eps,
                                 RmsNormResult out) {
  const int64_t tokens = x.dim(0), width = x.dim(1);
  CheckWidth("RmsNormForward", width);
  // Whole packs need rows that start at 16 bytes.
  const bool packs = width % kPackElements == 0 && Aligned16(x.raw()) && Aligned16(w.raw());
  const bool warps = packs && width <= kWarpWidth;
  const int64_t blocks = warps ? (tokens * cuda::kWarp + kThreads - 1) / kThreads : tokens;
  DispatchGpuFloat(x.dtype(), "RmsNormForward", [&]<class T>() {
    constexpr int kPack = kPackElements;
    const auto kernel = !packs                 ? ForwardKernel<1, 0, kThreads, T>
                        : warps                ? ForwardKernel<kPack, kWarpHeld, cuda::kWarp, T>
                        : width <= kBlockWidth ? ForwardKernel<kPack, kBlockHeld, kThreads, T>
                                               : ForwardKernel<kPack, 0, kThreads, T>;
    cuda::Launch(ctx.cuda(), "RmsNormForward", kernel,
                 {dim3(cuda::GridSize(blocks)), dim3(kThreads)}, tokens, width, x.data<T>(),
                 w.data<float>(), eps, out.y.data<T>(), out.rstd.data<float>());
  });
  return out;
}

Tensor RmsNormBackwardCuda(Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& w,
                           const Tensor& rstd, Tensor& dw) {
  const int64_t tokens = x.dim(0), width = x.dim(1);
  CheckWidth("RmsNormBackward", width);
  const int64_t rows = std::max<int64_t>(1, (tokens + kMaxPartials - 1) / kMaxPartials);
  const int64_t partials = (tokens + rows - 1) / rows;
  const Tensor dx = ctx.Empty(x.shape(), x.dtype());
  const Tensor partial = ctx.Empty({partials, width}, DType::kF32);
  const bool packs =
      width % kPackElements == 0 && Aligned16(dy.raw()) && Aligned16(x.raw()) && Aligned16(w.raw());
  DispatchGpuFloat(x.dtype(), "RmsNormBackward", [&]<class T>() {
    constexpr int kPack = kPackElements;
    const auto kernel = !packs                     ? BackwardKernel<1, 0, T>
                        : width <= kBlockWidth / 2 ? BackwardKernel<kPack, kBlockHeld / 2, T>
                        : width <= kBlockWidth     ? BackwardKernel<kPack, kBlockHeld, T>
                                                   : BackwardKernel<kPack, 0, T>;
    const cuda::LaunchShape shape{dim3(cuda::GridSize(partials)), dim3(kThreads),
                                  static_cast<size_t>(width) * sizeof(float)};
    cuda::Launch(ctx.cuda(), "RmsNormBackward", kernel, shape, tokens, rows, width, dy.data<T>(),
                 x.data<T>(), w.data<float>(), rstd.data<float>(), dx.data<T>(),
                 partial.data<float>());
  });
  if (dw.defined()) AddRowsInto(ctx, dw, partial);
  return dx;
}

}  // namespace longspan::ops::internal
