#include "ops/loss/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
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
void ForChunks(const Context& ctx, const Tensor& labels, int64_t vocab,
               const LinearCrossEntropyOptions& options, Body body) {
  const int64_t tokens = labels.dim(0);
  const int64_t chunk = internal::ChunkTokens(ctx, vocab, options);
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
struct Range {
  Acc min, max;
};

// Of the elements that are not NaN, unless the first one is.
template <class Acc>
Range<Acc> RowRange(const Acc* row, int64_t n) {
  Acc low[internal::kSumLanes], high[internal::kSumLanes];
  std::fill(std::begin(low), std::end(low), row[0]);
  std::fill(std::begin(high), std::end(high), row[0]);
  int64_t i = 0;
  for (; i + internal::kSumLanes <= n; i += internal::kSumLanes) {
    for (int64_t l = 0; l < internal::kSumLanes; ++l) {
      low[l] = row[i + l] < low[l] ? row[i + l] : low[l];
      high[l] = row[i + l] > high[l] ? row[i + l] : high[l];
    }
  }
  for (; i < n; ++i) {
    low[0] = row[i] < low[0] ? row[i] : low[0];
    high[0] = row[i] > high[0] ? row[i] : high[0];
  }
  return {*std::min_element(std::begin(low), std::end(low)),
          *std::max_element(std::begin(high), std::end(high))};
}

// Log of the sum of exp over a row. Runs are summed in the row's dtype, their sums in f64, so that
// a large vocabulary costs no accuracy. NaN for a row that holds a NaN or an infinity; -inf needs
// asking, since it would add a harmless zero.
template <class Acc>
Acc LogSumExp(const Acc* row, int64_t n) {
  const auto [min, max] = RowRange(row, n);
  if (min == -std::numeric_limits<Acc>::infinity()) return std::numeric_limits<Acc>::quiet_NaN();
  double sum = 0;
  alignas(64) Acc e[internal::kRunElements];
  for (int64_t i = 0; i < n; i += internal::kRunElements) {
    const int64_t count = std::min(internal::kRunElements, n - i);
    for (int64_t j = 0; j < count; ++j) e[j] = internal::Exp(row[i + j] - max);
    sum += static_cast<double>(internal::RunSum<Acc>(count, [&e](int64_t j) { return e[j]; }));
  }
  return static_cast<Acc>(static_cast<double>(max) + std::log(sum));
}

template <class Acc>
void Forward(Context& ctx, const Tensor& x, const Tensor& w, const Tensor& labels,
             const LinearCrossEntropyOptions& options, Tensor& losses,
             LinearCrossEntropyResult& result) {
  const int64_t vocab = w.dim(0);
  const int32_t* label = labels.data<int32_t>();
  Acc *lse = result.lse.data<Acc>(), *loss = losses.data<Acc>();
  const Tensor buffer = ChunkBuffer(ctx, x.dim(0), vocab, options, DTypeOf<Acc>());
  ForChunks(ctx, labels, vocab, options, [&](int64_t begin, int64_t end) {
    Tensor logits = buffer.Rows(0, end - begin);
    Gemm(ctx, x.Rows(begin, end), false, w, true, logits);
    const Acc* rows = logits.data<Acc>();
    ParallelRanges(ctx, end - begin, RowsPerTask(vocab), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t t = begin + r;
        if (label[t] == kNoLabel) continue;
        lse[t] = LogSumExp(rows + r * vocab, vocab);
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

// One row: logits become scale * (p (1 + 2 z_loss lse) - [v == label]), rounded into `out`.
template <class T>
void LogitGradient(Accumulator<T>* logits, int64_t vocab, int32_t label, Accumulator<T> lse,
                   double z_loss, double scale, T* out) {
  using Acc = Accumulator<T>;
  if (label == kNoLabel) {
    std::fill(out, out + vocab, T(Acc(0)));
    return;
  }
  const auto factor = static_cast<Acc>(scale * (1 + 2 * z_loss * static_cast<double>(lse)));
  for (int64_t v = 0; v < vocab; ++v) logits[v] = internal::Exp(logits[v] - lse) * factor;
  logits[label] -= static_cast<Acc>(scale);
  internal::Narrow(logits, vocab, out);
}

template <class T>
void Backward(Context& ctx, const LinearCrossEntropyResult& saved, const Tensor& x, const Tensor& w,
              const Tensor& labels, const LinearCrossEntropyOptions& options, double scale,
              Tensor& dx, Tensor& dw) {
  using Acc = Accumulator<T>;
  const int64_t vocab = w.dim(0);
  const int32_t* label = labels.data<int32_t>();
  const Acc* lse = saved.lse.data<Acc>();
  const Tensor logit_buffer = ChunkBuffer(ctx, x.dim(0), vocab, options, DTypeOf<Acc>());
  const Tensor gradient_buffer =
      std::is_same_v<T, Acc> ? logit_buffer : ChunkBuffer(ctx, x.dim(0), vocab, options, x.dtype());
  ForChunks(ctx, labels, vocab, options, [&](int64_t begin, int64_t end) {
    const Tensor x_chunk = x.Rows(begin, end), gradient = gradient_buffer.Rows(0, end - begin);
    Tensor logits = logit_buffer.Rows(0, end - begin), dx_chunk = dx.Rows(begin, end);
    Gemm(ctx, x_chunk, false, w, true, logits);
    Acc* rows = logits.data<Acc>();
    T* out = gradient.data<T>();
    ParallelRanges(ctx, end - begin, RowsPerTask(vocab), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        LogitGradient<T>(rows + r * vocab, vocab, label[begin + r], lse[begin + r], options.z_loss,
                         scale, out + r * vocab);
      }
    });
    Gemm(ctx, gradient, false, w, false, dx_chunk);
    if (dw.defined()) Gemm(ctx, gradient, true, x_chunk, false, dw, {.accumulate = true});
  });
}

}  // namespace

int64_t AutoChunkTokens(int64_t vocab, DeviceKind device) {
  const int64_t bytes = device == DeviceKind::kCuda ? kDeviceLogitBytes : kHostLogitBytes;
  // Whole multiples of 64 tokens keep the matrix products efficient for a huge vocabulary too.
  return std::max<int64_t>(1, bytes / (vocab * 4 * 64)) * 64;
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
