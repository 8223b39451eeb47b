// Runs of elements that share a gate are (token, kv head) pairs; a block of the backward pass owns
// a fixed range of tokens of one kv head, so that the gate's gradient is summed in a fixed order.
#include <algorithm>

#include "ops/core/cuda/reduce.cuh"
#include "ops/elementwise/elementwise.h"
#include "ops/elementwise/map_cuda.cuh"
#include "ops/gate/duo_gate_cuda.h"
#include "ops/loss/linear_cross_entropy.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxPartials = 1024;  // ranges of tokens

// `length` elements share a gate: those of one token and kv head. A multiple of N.
template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(int64_t n, int64_t length, int64_t gates, const T* full, const T* stream,
                  const float* alpha, T* o) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= n) return;
  const float a = alpha[i / length % gates], rest = 1.0f - a;
  const Pack<T, N> x = PackAt<N>(full, i), y = PackAt<N>(stream, i);
  float out[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    out[j] = a * static_cast<float>(x.element[j]) + rest * static_cast<float>(y.element[j]);
  }
  StoreRounded(o + i, out);
}

template <class T>
struct BackwardArrays {
  const T *d_out, *full, *stream;
  const float* alpha;
  T *dfull, *dstream;  // nullptr: not wanted
  float* partial;      // [ranges, gates]
};

// Block (range, gate) owns `rows` tokens.
template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(int64_t tokens, int64_t rows, int64_t length, BackwardArrays<T> a) {
  const int64_t gates = gridDim.y, gate = blockIdx.y;
  const int64_t begin = blockIdx.x * rows, end = begin + rows < tokens ? begin + rows : tokens;
  const int64_t packs = length / N, all = (end - begin) * packs;
  const float open = a.alpha[gate], rest = 1.0f - open;
  float sum = 0;
  for (int64_t p = threadIdx.x; p < all; p += kThreads) {
    const int64_t i = ((begin + p / packs) * gates + gate) * length + p % packs * N;
    const Pack<T, N> dy = PackAt<N>(a.d_out, i);
    const Pack<T, N> x = PackAt<N>(a.full, i), y = PackAt<N>(a.stream, i);
    float slope_full[N], slope_stream[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float slope = static_cast<float>(dy.element[j]);
      sum += slope * (static_cast<float>(x.element[j]) - static_cast<float>(y.element[j]));
      slope_full[j] = open * slope;
      slope_stream[j] = rest * slope;
    }
    if (a.dfull == nullptr) continue;
    StoreRounded(a.dfull + i, slope_full);
    StoreRounded(a.dstream + i, slope_stream);
  }
  sum = cuda::BlockSum<kThreads>(sum);
  if (threadIdx.x == 0) a.partial[blockIdx.x * gates + gate] = sum;
}

// One thread: a model has few gates a layer.
__global__ void PenaltyKernel(int64_t gates, const float* alpha, GatePenalty penalty,
                              double* sums) {
  double open = 0;
  for (int64_t g = 0; g < gates; ++g) open += static_cast<double>(alpha[g]);
  sums[kLossSum] += penalty.weight * sums[kValidSum] * open;
  sums[kZLossSum] += penalty.share * sums[kValidSum] * open;
}

__global__ void PenaltySlopeKernel(int64_t gates, const double* sums, double weight,
                                   float* dalpha) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (g < gates) dalpha[g] += static_cast<float>(weight * sums[kValidSum]);
}

void RequireF32(const char* op, const Tensor& gates) {
  if (gates.dtype() == DType::kF32) return;
  throw Unsupported(Str(op, ": f64 is not built for GPUs; use f32"));
}

}  // namespace

Tensor DuoGateForwardCuda(Context& ctx, const Tensor& full, const Tensor& stream,
                          const Tensor& alpha, Tensor o) {
  const int64_t gates = alpha.dim(0), length = full.dim(1) / gates * full.dim(2);
  const bool packs =
      length % kPackElements == 0 && Aligned16(full.raw()) && Aligned16(stream.raw());
  DispatchGpuFloat(full.dtype(), "DuoGateForward", [&]<class T>() {
    cuda::Launch(ctx.cuda(), "DuoGateForward",
                 packs ? ForwardKernel<kPackElements, T> : ForwardKernel<1, T>,
                 cuda::Cover(full.numel(), kThreads, packs ? kPackElements : 1), full.numel(),
                 length, gates, full.data<T>(), stream.data<T>(), alpha.data<float>(), o.data<T>());
  });
  return o;
}

DuoGateGradients DuoGateBackwardCuda(Context& ctx, const Tensor& d_out, const Tensor& full,
                                     const Tensor& stream, const Tensor& alpha, Tensor& dalpha,
                                     DuoGateGradients out) {
  const int64_t tokens = full.dim(0), gates = alpha.dim(0);
  const int64_t length = full.dim(1) / gates * full.dim(2);
  const int64_t rows = std::max<int64_t>(16, (tokens + kMaxPartials - 1) / kMaxPartials);
  const int64_t ranges = (tokens + rows - 1) / rows;
  const Tensor partial = ctx.Empty({ranges, gates}, DType::kF32);
  const bool packs = length % kPackElements == 0 && Aligned16(full.raw()) &&
                     Aligned16(stream.raw()) && Aligned16(d_out.raw());
  DispatchGpuFloat(full.dtype(), "DuoGateBackward", [&]<class T>() {
    const bool branches = out.full.defined();
    const BackwardArrays<T> arrays{d_out.data<T>(),
                                   full.data<T>(),
                                   stream.data<T>(),
                                   alpha.data<float>(),
                                   branches ? out.full.data<T>() : nullptr,
                                   branches ? out.stream.data<T>() : nullptr,
                                   partial.data<float>()};
    cuda::Launch(ctx.cuda(), "DuoGateBackward",
                 packs ? BackwardKernel<kPackElements, T> : BackwardKernel<1, T>,
                 {dim3(cuda::GridSize(ranges), static_cast<unsigned>(gates)), dim3(kThreads)},
                 tokens, rows, length, arrays);
  });
  if (dalpha.defined()) AddRowsInto(ctx, dalpha, partial);
  return out;
}

void GatePenaltyForwardCuda(Context& ctx, const Tensor& alpha, const GatePenalty& penalty,
                            Tensor& sums) {
  RequireF32("GatePenaltyForward", alpha);
  cuda::Launch(ctx.cuda(), "GatePenaltyForward", PenaltyKernel, {dim3(1), dim3(1)}, alpha.dim(0),
               alpha.data<float>(), penalty, sums.data<double>());
}

void GatePenaltyBackwardCuda(Context& ctx, const Tensor& sums, const GatePenalty& penalty,
                             Tensor& dalpha) {
  RequireF32("GatePenaltyBackward", dalpha);
  cuda::Launch(ctx.cuda(), "GatePenaltyBackward", PenaltySlopeKernel, cuda::Cover(dalpha.dim(0)),
               dalpha.dim(0), sums.data<double>(), penalty.weight, dalpha.data<float>());
}

}  // namespace longspan::ops::internal
