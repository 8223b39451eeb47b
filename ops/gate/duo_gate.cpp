#include "ops/gate/duo_gate.h"

#include <vector>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/elementwise.h"
#include "ops/elementwise/rows.h"
#include "ops/gate/duo_gate_cuda.h"
#include "ops/loss/linear_cross_entropy.h"

namespace longspan::ops {
namespace {

using internal::Narrow;
using internal::Staging;
using internal::Widen;

constexpr int64_t kTokensPerPartial = 64;  // tokens behind one row of partial gate gradients

void CheckOperands(const char* op, const Tensor& full, const Tensor& stream, const Tensor& alpha) {
  LONGSPAN_CHECK(full.rank() == 3 && IsFloat(full.dtype()) && full.shape() == stream.shape() &&
                 full.dtype() == stream.dtype())
      << op << ": full is " << full.Describe() << " and stream " << stream.Describe()
      << "; both must be float [T, Hq, D]";
  LONGSPAN_CHECK(alpha.rank() == 1 && alpha.dim(0) >= 1 && full.dim(1) % alpha.dim(0) == 0 &&
                 alpha.dtype() == AccumulatorOf(full.dtype()))
      << op << ": alpha is " << alpha.Describe() << " for branches " << full.Describe();
}

void CheckPenalty(const char* op, const Tensor& gates, const Tensor& sums) {
  LONGSPAN_CHECK(gates.rank() == 1 &&
                 (gates.dtype() == DType::kF32 || gates.dtype() == DType::kF64))
      << op << ": the gates are " << gates.Describe();
  LONGSPAN_CHECK(sums.shape() == Shape({kLossSums}) && sums.dtype() == DType::kF64)
      << op << ": sums is " << sums.Describe() << ", not f64[" << int{kLossSums} << "]";
}

// One run of elements that share a gate: the `group` heads of a kv head, of one token.
struct Runs {
  int64_t tokens, gates, length;
  explicit Runs(const Tensor& full, const Tensor& alpha)
      : tokens(full.dim(0)),
        gates(alpha.dim(0)),
        length(full.dim(1) / alpha.dim(0) * full.dim(2)) {}
};

template <class T>
void Forward(Context& ctx, const Tensor& full, const Tensor& stream, const Tensor& alpha,
             Tensor& o) {
  using Acc = Accumulator<T>;
  const Runs runs(full, alpha);
  const T *f = full.data<T>(), *s = stream.data<T>();
  T* out = o.data<T>();
  const Acc* gate = alpha.data<Acc>();
  ParallelRanges(ctx, runs.tokens, kTokensPerPartial, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(3 * static_cast<size_t>(runs.length));
    for (int64_t i = begin * runs.gates; i < end * runs.gates; ++i) {
      const Acc a = gate[i % runs.gates], rest = Acc(1) - a;
      const int64_t at = i * runs.length;
      const Acc* x = Widen(f + at, runs.length, scratch.data());
      const Acc* y = Widen(s + at, runs.length, scratch.data() + runs.length);
      Acc* __restrict to = Staging(out + at, scratch.data() + 2 * runs.length);
      for (int64_t d = 0; d < runs.length; ++d) to[d] = a * x[d] + rest * y[d];
      Narrow(to, runs.length, out + at);
    }
  });
}

template <class T>
void Backward(Context& ctx, const Tensor& d_out, const Tensor& full, const Tensor& stream,
              const Tensor& alpha, Tensor& dalpha, DuoGateGradients& out) {
  using Acc = Accumulator<T>;
  const Runs runs(full, alpha);
  const int64_t partials = (runs.tokens + kTokensPerPartial - 1) / kTokensPerPartial;
  const Tensor partial = ctx.Zeros({partials, runs.gates}, DTypeOf<Acc>());
  const T *f = full.data<T>(), *s = stream.data<T>(), *dy = d_out.data<T>();
  const Acc* gate = alpha.data<Acc>();
  ParallelRanges(ctx, runs.tokens, kTokensPerPartial, [&](int64_t begin, int64_t end) {
    const auto n = static_cast<size_t>(runs.length);
    std::vector<Acc> wide_f(n), wide_s(n), wide_dy(n), staged(n);
    Acc* sums = partial.data<Acc>() + begin / kTokensPerPartial * runs.gates;
    const auto scaled = [&](const Acc* from, Acc factor, T* to) {
      Acc* __restrict staging = Staging(to, staged.data());
      for (int64_t d = 0; d < runs.length; ++d) staging[d] = factor * from[d];
      Narrow(staging, runs.length, to);
    };
    for (int64_t i = begin * runs.gates; i < end * runs.gates; ++i) {
      const int64_t g = i % runs.gates, at = i * runs.length;
      const Acc* x = Widen(f + at, runs.length, wide_f.data());
      const Acc* y = Widen(s + at, runs.length, wide_s.data());
      const Acc* slope = Widen(dy + at, runs.length, wide_dy.data());
      sums[g] +=
          internal::RunSum<Acc>(runs.length, [&](int64_t d) { return slope[d] * (x[d] - y[d]); });
      if (!out.full.defined()) continue;
      scaled(slope, gate[g], out.full.data<T>() + at);
      scaled(slope, Acc(1) - gate[g], out.stream.data<T>() + at);
    }
  });
  if (dalpha.defined()) AddRowsInto(ctx, dalpha, partial);
}

}  // namespace

Tensor DuoGateForward(Context& ctx, const Tensor& full, const Tensor& stream, const Tensor& alpha) {
  CheckOperands("DuoGateForward", full, stream, alpha);
  Tensor o = ctx.Empty(full.shape(), full.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::DuoGateForwardCuda(ctx, full, stream, alpha, o));
  DispatchFloat(full.dtype(), "DuoGateForward",
                [&]<class T>() { Forward<T>(ctx, full, stream, alpha, o); });
  return o;
}

DuoGateGradients DuoGateBackward(Context& ctx, const Tensor& d_out, const Tensor& full,
                                 const Tensor& stream, const Tensor& alpha, Tensor& dalpha,
                                 bool want_branches) {
  CheckOperands("DuoGateBackward", full, stream, alpha);
  LONGSPAN_CHECK(d_out.shape() == full.shape() && d_out.dtype() == full.dtype())
      << "DuoGateBackward: d_out is " << d_out.Describe() << " for branches " << full.Describe();
  LONGSPAN_CHECK(!dalpha.defined() ||
                 (dalpha.shape() == alpha.shape() && dalpha.dtype() == alpha.dtype()))
      << "DuoGateBackward: dalpha is " << dalpha.Describe() << " for alpha " << alpha.Describe();
  DuoGateGradients out;
  if (want_branches) {
    out.full = ctx.Empty(full.shape(), full.dtype());
    out.stream = ctx.Empty(full.shape(), full.dtype());
  }
  LONGSPAN_ON_CUDA(
      ctx, internal::DuoGateBackwardCuda(ctx, d_out, full, stream, alpha, dalpha, std::move(out)));
  DispatchFloat(full.dtype(), "DuoGateBackward",
                [&]<class T>() { Backward<T>(ctx, d_out, full, stream, alpha, dalpha, out); });
  return out;
}

void GatePenaltyForward(Context& ctx, const Tensor& alpha, const GatePenalty& penalty,
                        Tensor& sums) {
  CheckPenalty("GatePenaltyForward", alpha, sums);
  LONGSPAN_ON_CUDA(ctx, internal::GatePenaltyForwardCuda(ctx, alpha, penalty, sums));
  DispatchFloat(alpha.dtype(), "GatePenaltyForward", [&]<class T>() {
    double open = 0, *s = sums.data<double>();
    for (int64_t g = 0; g < alpha.dim(0); ++g) open += static_cast<double>(alpha.data<T>()[g]);
    s[kLossSum] += penalty.weight * s[kValidSum] * open;
    s[kZLossSum] += penalty.share * s[kValidSum] * open;
  });
}

void GatePenaltyBackward(Context& ctx, const Tensor& sums, const GatePenalty& penalty,
                         Tensor& dalpha) {
  CheckPenalty("GatePenaltyBackward", dalpha, sums);
  LONGSPAN_ON_CUDA(ctx, internal::GatePenaltyBackwardCuda(ctx, sums, penalty, dalpha));
  DispatchFloat(dalpha.dtype(), "GatePenaltyBackward", [&]<class T>() {
    if constexpr (!std::is_same_v<T, BF16>) {
      const T slope = static_cast<T>(penalty.weight * sums.data<double>()[kValidSum]);
      for (int64_t g = 0; g < dalpha.dim(0); ++g) dalpha.data<T>()[g] += slope;
    }
  });
}

}  // namespace longspan::ops
