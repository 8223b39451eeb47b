#include "ops/loss/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/elementwise.h"
#include "ops/elementwise/exp.h"
#include "ops/elementwise/rows.h"
#include "ops/gemm/gemm.h"
#include "ops/loss/linear_cross_entropy_cuda.h"

namespace longspan::ops {
namespace {

constexpr int64_t kHostLogitBytes = int64_t{32} << 20, kDeviceLogitBytes = int64_t{1} << 30;
using internal::ChunkBuffer;
using internal::kNoLabel;

void CheckOperands(const char* op, const Tensor& x, const Tensor& w, const Tensor& labels,
                   const LinearCrossEntropyOptions& options) {
  LONGSPAN_CHECK(x.rank() == 2 && w.rank() == 2 && x.dim(1) == w.dim(1) && w.dim(0) >= 1 &&
                 x.dtype() == w.dtype() && IsFloat(x.dtype()))
      << op << ": x " << x.Describe() << " and w " << w.Describe();
  LONGSPAN_CHECK(labels.shape() == Shape({x.dim(0)}) && labels.dtype() == DType::kI32)
      << op << ": labels " << labels.Describe() << " for x " << x.Describe();
  LONGSPAN_CHECK(options.chunk_tokens >= 0 && options.z_loss >= 0)
      << op << ": chunk_tokens " << options.chunk_tokens << ", z_loss " << options.z_loss;
  if (labels.device().kind != DeviceKind::kCpu) return;  // their values cannot be read here
  const int32_t* label = labels.data<int32_t>();
  for (int64_t t = 0; t < labels.dim(0); ++t) {
    if (label[t] != kNoLabel && (label[t] < 0 || label[t] >= w.dim(0))) {
      throw InvalidArgument(Str("token ", t, " has label ", label[t],
                                ", outside the vocabulary of ", w.dim(0),
                                " entries (-1 means no label)"));
    }
  }
}

// Calls body(begin, end) for every chunk of tokens in which at least one has a label.
template <class Body>
void ForChunks(const Tensor& labels, int64_t chunk, Body body) {
  const int64_t tokens = labels.dim(0);
  const int32_t* label = labels.data<int32_t>();
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t end = std::min(tokens, begin + chunk);
    if (std::any_of(label + begin, label + end, [](int32_t l) { return l != kNoLabel; })) {
      body(begin, end);
    }
  }
}

int64_t RowsPerTask(int64_t vocab) { return std::max<int64_t>(1, internal::kTaskElements / vocab); }

template <class Acc>
void Forward(Context& ctx, const Tensor& x, const Tensor& w, const Tensor& labels,
             const LinearCrossEntropyOptions& options, Tensor& losses,
             LinearCrossEntropyResult& result) {
  const int64_t vocab = w.dim(0);
  const int32_t* label = labels.data<int32_t>();
  Acc *lse = result.lse.data<Acc>(), *loss = losses.data<Acc>();
  const Tensor buffer = ChunkBuffer(ctx, x.dim(0), vocab, options, DTypeOf<Acc>());
  ForChunks(labels, internal::ChunkTokens(ctx, vocab, options), [&](int64_t begin, int64_t end) {
    Tensor logits = buffer.Rows(0, end - begin);
    Gemm(ctx, x.Rows(begin, end), false, w, true, logits);
    const Acc* rows = logits.data<Acc>();
    ParallelRanges(ctx, end - begin, RowsPerTask(vocab), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t t = begin + r;
        if (label[t] == kNoLabel) continue;
        lse[t] = internal::Rows<Acc>().log_sum_exp(vocab, rows + r * vocab);
        loss[t] = lse[t] - rows[r * vocab + label[t]];
      }
    });
  });
  double* sums = result.sums.data<double>();
  for (int64_t t = 0; t < x.dim(0); ++t) {
    if (label[t] == kNoLabel) continue;
    sums[kLossSum] += static_cast<double>(loss[t]);
    sums[kZLossSum] += options.z_loss * static_cast<double>(lse[t]) * static_cast<double>(lse[t]);
    sums[kValidSum] += 1;
  }
}

// One row of a block of words: out = scale * (p (1 + 2 z_loss lse) - [v == own]) of the logits,
// which `out` may be. `own` is the label counted from the block's first word.
template <class T>
void LogitGradient(const Accumulator<T>* logits, int64_t words, int32_t label, int64_t own,
                   Accumulator<T> lse, double z_loss, double scale, T* out) {
  using Acc = Accumulator<T>;
  if (label == kNoLabel) {
    std::fill(out, out + words, T(Acc(0)));
    return;
  }
  const auto factor = static_cast<Acc>(scale * (1 + 2 * z_loss * static_cast<double>(lse)));
  const bool here = own >= 0 && own < words;
  const Acc at_label =
      here ? internal::Exp(logits[own] - lse) * factor - static_cast<Acc>(scale) : Acc(0);
  internal::Rows<T>().softmax_gradient(words, logits, lse, factor, out);
  if (here) out[own] = T(at_label);
}

// As many logits as one chunk of the forward pass has, over more tokens and fewer words: then fewer
// passes read all of w and read and write all of dw. dx is summed over the blocks of words.
struct BackwardBlocks {
  // `chunk_tokens` of the forward pass.
  BackwardBlocks(int64_t all_tokens, int64_t vocab, int64_t chunk_tokens) {
    constexpr int64_t kWords = 4096;
    const auto even = [](int64_t size, int64_t most) {
      const int64_t pieces = std::max<int64_t>(1, (size + most - 1) / most);
      return std::max<int64_t>(1, (size + pieces - 1) / pieces);
    };
    words = even(vocab, kWords);
    tokens = even(all_tokens, chunk_tokens * vocab / words);
  }
  int64_t words, tokens;
};

template <class T>
void Backward(Context& ctx, const LinearCrossEntropyResult& saved, const Tensor& x, const Tensor& w,
              const Tensor& labels, const LinearCrossEntropyOptions& options, double scale,
              Tensor& dx, Tensor& dw) {
  using Acc = Accumulator<T>;
  const int64_t vocab = w.dim(0);
  const int32_t* label = labels.data<int32_t>();
  const Acc* lse = saved.lse.data<Acc>();
  const BackwardBlocks blocks(x.dim(0), vocab, internal::ChunkTokens(ctx, vocab, options));
  const int64_t most = std::min(blocks.tokens, x.dim(0));
  const Tensor logit_buffer = ctx.Empty({most * blocks.words}, DTypeOf<Acc>());
  const Tensor gradient_buffer =
      std::is_same_v<T, Acc> ? logit_buffer : ctx.Empty({most * blocks.words}, x.dtype());
  const Tensor sum_buffer =
      std::is_same_v<T, Acc> ? dx : ctx.Empty({most, x.dim(1)}, DTypeOf<Acc>());
  ForChunks(labels, blocks.tokens, [&](int64_t begin, int64_t end) {
    const int64_t tokens = end - begin;
    const Tensor x_chunk = x.Rows(begin, end);
    Tensor sums = std::is_same_v<T, Acc> ? dx.Rows(begin, end) : sum_buffer.Rows(0, tokens);
    for (int64_t first = 0; first < vocab; first += blocks.words) {
      const int64_t words = std::min(blocks.words, vocab - first);
      const Tensor w_block = w.Rows(first, first + words);
      Tensor logits = logit_buffer.Rows(0, tokens * words).Reshape({tokens, words});
      const Tensor gradient = gradient_buffer.Rows(0, tokens * words).Reshape({tokens, words});
      Gemm(ctx, x_chunk, false, w_block, true, logits);
      const Acc* rows = logits.data<Acc>();
      T* out = gradient.data<T>();
      ParallelRanges(ctx, tokens, RowsPerTask(words), [&](int64_t low, int64_t high) {
        for (int64_t r = low; r < high; ++r) {
          const int64_t t = begin + r;
          LogitGradient<T>(rows + r * words, words, label[t], label[t] - first, lse[t],
                           options.z_loss, scale, out + r * words);
        }
      });
      Gemm(ctx, gradient, false, w_block, false, sums, {.accumulate = first > 0});
      if (!dw.defined()) continue;
      Tensor dw_block = dw.Rows(first, first + words);
      Gemm(ctx, gradient, true, x_chunk, false, dw_block, {.accumulate = true});
    }
    if constexpr (!std::is_same_v<T, Acc>) {
      Tensor dx_chunk = dx.Rows(begin, end);
      CastInto(ctx, sums, dx_chunk);
    }
  });
}

}  // namespace

int64_t AutoChunkTokens(int64_t vocab, DeviceKind device) {
  const int64_t bytes = device == DeviceKind::kCuda ? kDeviceLogitBytes : kHostLogitBytes;
  // Whole multiples of 64 tokens keep the matrix products efficient for a huge vocabulary too.
  return std::max<int64_t>(1, bytes / (vocab * 4 * 64)) * 64;
}

LinearCrossEntropyScratch BackwardScratch(int64_t tokens, int64_t width, int64_t vocab, DType dtype,
                                          DeviceKind device) {
  const int64_t chunk = AutoChunkTokens(vocab, device);
  const bool same = dtype == AccumulatorOf(dtype);
  if (device == DeviceKind::kCuda) {
    const int64_t logits = std::min(chunk, tokens) * vocab;
    return {logits, same ? 0 : logits, 0};
  }
  const BackwardBlocks blocks(tokens, vocab, chunk);
  const int64_t most = std::min(blocks.tokens, tokens), logits = most * blocks.words;
  return {logits, same ? 0 : logits, same ? 0 : most * width};
}

namespace internal {

int64_t ChunkTokens(const Context& ctx, int64_t vocab, const LinearCrossEntropyOptions& options) {
  return options.chunk_tokens > 0 ? options.chunk_tokens
                                  : AutoChunkTokens(vocab, ctx.device().kind);
}

Tensor ChunkBuffer(Context& ctx, int64_t tokens, int64_t vocab,
                   const LinearCrossEntropyOptions& options, DType dtype) {
  return ctx.Empty({std::min(ChunkTokens(ctx, vocab, options), tokens), vocab}, dtype);
}

}  // namespace internal

LossSums ReadLossSums(const Tensor& sums) {
  LONGSPAN_CHECK(sums.shape() == Shape({kLossSums}) && sums.dtype() == DType::kF64)
      << "ReadLossSums: sums are " << sums.Describe() << ", not f64[" << kLossSums << "]";
  double values[kLossSums];
  sums.ReadTo(values);
  return {values[kLossSum], values[kZLossSum], std::llround(values[kValidSum])};
}

LinearCrossEntropyResult LinearCrossEntropyForward(Context& ctx, const Tensor& x, const Tensor& w,
                                                   const Tensor& labels,
                                                   const LinearCrossEntropyOptions& options) {
  CheckOperands("LinearCrossEntropyForward", x, w, labels, options);
  const DType wide = AccumulatorOf(x.dtype());
  LinearCrossEntropyResult result;
  result.sums = ctx.Zeros({kLossSums}, DType::kF64);
  result.lse = ctx.Zeros({x.dim(0)}, wide);
  Tensor losses = ctx.Zeros({x.dim(0)}, wide);
  if (options.want_token_losses) result.token_losses = losses;
  LONGSPAN_ON_CUDA(
      ctx, internal::LinearCrossEntropyForwardCuda(ctx, x, w, labels, options, losses, result));
  if (wide == DType::kF64) {
    Forward<double>(ctx, x, w, labels, options, losses, result);
  } else {
    Forward<float>(ctx, x, w, labels, options, losses, result);
  }
  return result;
}

Tensor LinearCrossEntropyBackward(Context& ctx, const LinearCrossEntropyResult& saved,
                                  const Tensor& x, const Tensor& w, const Tensor& labels,
                                  const LinearCrossEntropyOptions& options, double scale,
                                  Tensor& dw) {
  CheckOperands("LinearCrossEntropyBackward", x, w, labels, options);
  const DType wide = AccumulatorOf(x.dtype());
  LONGSPAN_CHECK(saved.lse.shape() == labels.shape() && saved.lse.dtype() == wide)
      << "LinearCrossEntropyBackward: saved lse " << saved.lse.Describe() << " for x "
      << x.Describe();
  LONGSPAN_CHECK(!dw.defined() || (dw.shape() == w.shape() && dw.dtype() == wide))
      << "LinearCrossEntropyBackward: dw " << dw.Describe() << " for w " << w.Describe();
  LONGSPAN_ON_CUDA(
      ctx, internal::LinearCrossEntropyBackwardCuda(ctx, saved, x, w, labels, options, scale, dw));
  Tensor dx = ctx.Zeros(x.shape(), x.dtype());  // chunks without a label are skipped
  DispatchFloat(x.dtype(), "LinearCrossEntropyBackward",
                [&]<class T>() { Backward<T>(ctx, saved, x, w, labels, options, scale, dx, dw); });
  return dx;
}

}  // namespace longspan::ops
