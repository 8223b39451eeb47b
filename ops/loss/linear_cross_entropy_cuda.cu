// Chunks of tokens as on the host: one product makes their logits in f32, one block a row reads
// them once. Every sum has an order that the sizes decide.
#include <algorithm>

#include "ops/core/cuda/reduce.cuh"
#include "ops/elementwise/exp.h"
#include "ops/elementwise/map_cuda.cuh"
#include "ops/gemm/gemm.h"
#include "ops/loss/linear_cross_entropy_cuda.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;                   // f32 logits of 16 bytes
constexpr int64_t kTokensPerBlock = 4096;  // of the first stage of the sums
constexpr int64_t kLogitsPerBlock = int64_t{kThreads} * kPack * 4;

// What a thread has seen of a row: the largest logit, the sum of e^(logit - max) and NaN in `taint`
// after a logit that is not finite; -inf would add a harmless zero to the sum.
struct RowState {
  float max = -INFINITY, sum = 0, taint = 0;

  template <int N>
  __device__ void Take(const float (&logit)[N]) {
    float largest = logit[0];
#pragma unroll
    for (int j = 1; j < N; ++j) largest = fmaxf(largest, logit[j]);
    if (largest > max) {
      sum *= Exp(max - largest);
      max = largest;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum += Exp(logit[j] - max);
      taint += logit[j] - logit[j];
    }
  }
};

// lse and loss of one token a block.
template <int N>
__global__ void __launch_bounds__(kThreads)
    LossKernel(int64_t vocab, const float* logits, const int32_t* labels, float* lse,
               float* losses) {
  const int64_t t = blockIdx.x;
  const int32_t label = labels[t];
  if (label == kNoLabel) return;  // both stay 0
  const float* row = logits + t * vocab;
  RowState state;
  for (int64_t v = static_cast<int64_t>(threadIdx.x) * N; v < vocab; v += kThreads * N) {
    if (v + N <= vocab) {
      const Pack<float, N> in = PackAt<N>(row, v);  // a copy: one load
      state.Take(in.element);
    } else {
#pragma unroll 1
      for (int64_t j = v; j < vocab; ++j) state.Take({row[j]});
    }
  }
  const float max = cuda::BlockMax<kThreads>(state.max);
  // A thread without logits has sum 0 and max -inf.
  const double mine =
      state.sum > 0 ? static_cast<double>(state.sum) * static_cast<double>(Exp(state.max - max))
                    : static_cast<double>(state.sum);
  const double sum = cuda::BlockSum<kThreads>(mine);
  const float taint = cuda::BlockSum<kThreads>(state.taint);
  if (threadIdx.x > 0) return;
  const bool known = label >= 0 && label < vocab;
  const float result = static_cast<float>(static_cast<double>(max) + log(sum)) + taint;
  lse[t] = known ? result : NAN;
  losses[t] = known ? result - row[label] : NAN;
}

// partial [blocks, kLossSums] of kTokensPerBlock tokens each.
__global__ void __launch_bounds__(kThreads)
    PartialSumsKernel(int64_t tokens, double z_loss, const int32_t* labels, const float* lse,
                      const float* losses, double* partial) {
  const int64_t begin = blockIdx.x * kTokensPerBlock;
  const int64_t end = begin + kTokensPerBlock < tokens ? begin + kTokensPerBlock : tokens;
  double loss = 0, z = 0, valid = 0;
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    if (labels[t] == kNoLabel) continue;
    const double l = static_cast<double>(lse[t]);
    loss += static_cast<double>(losses[t]);
    z += z_loss * l * l;
    valid += 1;
  }
  loss = cuda::BlockSum<kThreads>(loss);
  z = cuda::BlockSum<kThreads>(z);
  valid = cuda::BlockSum<kThreads>(valid);
  if (threadIdx.x > 0) return;
  double* out = partial + blockIdx.x * int64_t{kLossSums};
  out[kLossSum] = loss;
  out[kZLossSum] = z;
  out[kValidSum] = valid;
}

__global__ void AddPartialsKernel(int64_t blocks, const double* partial, double* sums) {
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b * kLossSums + threadIdx.x];
  sums[threadIdx.x] = sum;
}

// Logits become scale * (p (1 + 2 z_loss lse) - [v == label]), rounded into `out`, which may be the
// logits themselves. A row is shared by gridDim.y blocks.
template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    GradientKernel(int64_t vocab, const float* logits, const int32_t* labels, const float* lse,
                   double z_loss, double scale, T* out) {
  const int64_t t = blockIdx.x, begin = blockIdx.y * kLogitsPerBlock;
  const int64_t end = begin + kLogitsPerBlock < vocab ? begin + kLogitsPerBlock : vocab;
  const int32_t label = labels[t];
  const bool counts = label != kNoLabel;
  const float l = lse[t];
  const float factor = static_cast<float>(scale * (1 + 2 * z_loss * static_cast<double>(l)));
  // Selects, so that the elements of a pack stay together.
  const float step = static_cast<float>(scale);
  const auto gradient = [&](float logit, int64_t v) {
    const float p = Exp(logit - l) * factor;
    return counts ? p - (v == label ? step : 0.0f) : 0.0f;
  };
  const float* row = logits + t * vocab;
  T* to = out + t * vocab;
  for (int64_t v = begin + static_cast<int64_t>(threadIdx.x) * N; v < end; v += kThreads * N) {
    if (v + N <= end) {
      const Pack<float, N> in = PackAt<N>(row, v);
      float slope[N];
#pragma unroll
      for (int j = 0; j < N; ++j) slope[j] = gradient(in.element[j], v + j);
      StoreRounded(to + v, slope);
    } else {
#pragma unroll 1
      for (int64_t j = v; j < end; ++j) to[j] = T(gradient(row[j], j));
    }
  }
}

// Calls body(begin, end) for every chunk of tokens.
template <class Body>
void ForChunks(const Context& ctx, int64_t tokens, int64_t vocab,
               const LinearCrossEntropyOptions& options, Body body) {
  const int64_t chunk = ChunkTokens(ctx, vocab, options);
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    body(begin, std::min(tokens, begin + chunk));
  }
}

// Buffers are aligned, so rows of whole packs are too.
bool WholePacks(int64_t vocab) { return vocab % kPack == 0; }

}  // namespace

LinearCrossEntropyResult LinearCrossEntropyForwardCuda(Context& ctx, const Tensor& x,
                                                       const Tensor& w, const Tensor& labels,
                                                       const LinearCrossEntropyOptions& options,
                                                       Tensor losses,
                                                       LinearCrossEntropyResult result) {
  const int64_t tokens = x.dim(0), vocab = w.dim(0);
  if (tokens == 0) return result;
  const Tensor buffer = ChunkBuffer(ctx, tokens, vocab, options, DType::kF32);
  const int32_t* label = labels.data<int32_t>();
  float *lse = result.lse.data<float>(), *loss = losses.data<float>();
  ForChunks(ctx, tokens, vocab, options, [&](int64_t begin, int64_t end) {
    Tensor logits = buffer.Rows(0, end - begin);
    Gemm(ctx, x.Rows(begin, end), false, w, true, logits);
    cuda::Launch(ctx.cuda(), "LinearCrossEntropyForward",
                 WholePacks(vocab) ? LossKernel<kPack> : LossKernel<1>,
                 {dim3(cuda::GridSize(end - begin)), dim3(kThreads)}, vocab, logits.data<float>(),
                 label + begin, lse + begin, loss + begin);
  });
  const int64_t blocks = (tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  const Tensor partial = ctx.Empty({blocks, kLossSums}, DType::kF64);
  cuda::Launch(ctx.cuda(), "LossPartialSums", PartialSumsKernel,
               {dim3(cuda::GridSize(blocks)), dim3(kThreads)}, tokens, options.z_loss, label, lse,
               loss, partial.data<double>());
  cuda::Launch(ctx.cuda(), "LossSums", AddPartialsKernel, {dim3(1), dim3(kLossSums)}, blocks,
               partial.data<double>(), result.sums.data<double>());
  return result;
}

Tensor LinearCrossEntropyBackwardCuda(Context& ctx, const LinearCrossEntropyResult& saved,
                                      const Tensor& x, const Tensor& w, const Tensor& labels,
                                      const LinearCrossEntropyOptions& options, double scale,
                                      Tensor& dw) {
  const int64_t tokens = x.dim(0), vocab = w.dim(0);
  const Tensor dx = ctx.Empty(x.shape(), x.dtype());
  const Tensor logit_buffer = ChunkBuffer(ctx, tokens, vocab, options, DType::kF32);
  const Tensor gradient_buffer =
      x.dtype() == DType::kF32 ? logit_buffer : ChunkBuffer(ctx, tokens, vocab, options, x.dtype());
  const int32_t* label = labels.data<int32_t>();
  const float* lse = saved.lse.data<float>();
  ForChunks(ctx, tokens, vocab, options, [&](int64_t begin, int64_t end) {
    const Tensor x_chunk = x.Rows(begin, end), gradient = gradient_buffer.Rows(0, end - begin);
    Tensor logits = logit_buffer.Rows(0, end - begin), dx_chunk = dx.Rows(begin, end);
    Gemm(ctx, x_chunk, false, w, true, logits);
    const cuda::LaunchShape shape{
        dim3(cuda::GridSize(end - begin),
             cuda::GridSize((vocab + kLogitsPerBlock - 1) / kLogitsPerBlock)),
        dim3(kThreads)};
    DispatchGpuFloat(x.dtype(), "LinearCrossEntropyBackward", [&]<class T>() {
      const auto kernel = WholePacks(vocab) ? GradientKernel<kPack, T> : GradientKernel<1, T>;
      cuda::Launch(ctx.cuda(), "LinearCrossEntropyBackward", kernel, shape, vocab,
                   logits.data<float>(), label + begin, lse + begin, options.z_loss, scale,
                   gradient.data<T>());
    });
    Gemm(ctx, gradient, false, w, false, dx_chunk);
    if (dw.defined()) Gemm(ctx, gradient, true, x_chunk, false, dw, {.accumulate = true});
  });
  return dx;
}

}  // namespace longspan::ops::internal
