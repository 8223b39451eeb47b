#include "ops/norm/rms_norm.h"

#include <cmath>
#include <vector>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/elementwise.h"
#include "ops/elementwise/rows.h"
#include "ops/norm/rms_norm_cuda.h"

namespace longspan::ops {
namespace {

using internal::Narrow;
using internal::RunSum;
using internal::Staging;
using internal::Widen;

constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kTokensPerPartial = 128;  // tokens behind one row of partial weight gradients

void CheckOperands(const char* op, const Tensor& x, const Tensor& w) {
  LONGSPAN_CHECK(x.rank() == 2 && x.dim(1) >= 1 && IsFloat(x.dtype()))
      << op << ": x is " << x.Describe() << ", not a float matrix";
  LONGSPAN_CHECK(w.rank() == 1 && w.dim(0) == x.dim(1) && IsFloat(w.dtype()) &&
                 AccumulatorOf(w.dtype()) == AccumulatorOf(x.dtype()))
      << op << ": w is " << w.Describe() << " for x " << x.Describe();
}

// 1 / sqrt(mean(row^2) + eps). Squares of finite f32 values can overflow f32, which would silently
// turn the row into zeros: such a row is summed again in f64 (all rows that way would take twice
// the time).
template <class Acc>
Acc InverseRms(const Acc* row, int64_t n, double eps) {
  const Acc square = RunSum<Acc>(n, [row](int64_t d) { return row[d] * row[d]; });
  if (std::isfinite(square)) {
    return Acc(1) / std::sqrt(square / static_cast<Acc>(n) + static_cast<Acc>(eps));
  }
  const auto wide = RunSum<double>(
      n, [row](int64_t d) { return static_cast<double>(row[d]) * static_cast<double>(row[d]); });
  return static_cast<Acc>(1 / std::sqrt(wide / static_cast<double>(n) + eps));
}

template <class T>
void Forward(Context& ctx, const Tensor& x, const Tensor& weight, double eps, RmsNormResult& out) {
  using Acc = Accumulator<T>;
  const int64_t tokens = x.dim(0), width = x.dim(1);
  const Acc* w = weight.data<Acc>();
  const T* in = x.data<T>();
  T* y = out.y.data<T>();
  Acc* rstd = out.rstd.data<Acc>();
  ParallelRanges(ctx, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    std::vector<Acc> wide(static_cast<size_t>(width)), staged(static_cast<size_t>(width));
    for (int64_t t = begin; t < end; ++t) {
      const Acc* row = Widen(in + t * width, width, wide.data());
      const Acc r = InverseRms(row, width, eps);
      rstd[t] = r;
      Acc* __restrict to = Staging(y + t * width, staged.data());
      for (int64_t d = 0; d < width; ++d) to[d] = row[d] * r * w[d];
      Narrow(to, width, y + t * width);
    }
  });
}

// With g = dy * w and xhat = x * rstd:  dx = rstd * (g - xhat * mean(g * xhat)),  dw += dy * xhat.
template <class T>
Tensor Backward(Context& ctx, const Tensor& d_out, const Tensor& x, const Tensor& weight,
                const Tensor& saved, Tensor& dw) {
  using Acc = Accumulator<T>;
  const int64_t tokens = x.dim(0), width = x.dim(1);
  const int64_t partials = (tokens + kTokensPerPartial - 1) / kTokensPerPartial;
  Tensor dx = ctx.Empty(x.shape(), x.dtype());
  Tensor partial = ctx.Zeros({partials, width}, DTypeOf<Acc>());
  const T *in = x.data<T>(), *dy = d_out.data<T>();
  const Acc *w = weight.data<Acc>(), *rstd = saved.data<Acc>();
  T* out = dx.data<T>();
  ParallelRanges(ctx, tokens, kTokensPerPartial, [&](int64_t begin, int64_t end) {
    const auto n = static_cast<size_t>(width);
    std::vector<Acc> wide_x(n), wide_dy(n), staged(n);
    Acc* __restrict sum = partial.data<Acc>() + begin / kTokensPerPartial * width;
    for (int64_t t = begin; t < end; ++t) {
      const Acc* row = Widen(in + t * width, width, wide_x.data());
      const Acc* drow = Widen(dy + t * width, width, wide_dy.data());
      const Acc r = rstd[t];
      const Acc dot = RunSum<Acc>(width, [&](int64_t d) { return drow[d] * w[d] * (row[d] * r); });
      const Acc mean = dot / static_cast<Acc>(width);
      Acc* __restrict to = Staging(out + t * width, staged.data());
      for (int64_t d = 0; d < width; ++d) {
        const Acc xhat = row[d] * r;
        sum[d] += drow[d] * xhat;
        to[d] = r * (drow[d] * w[d] - xhat * mean);
      }
      Narrow(to, width, out + t * width);
    }
  });
  if (dw.defined()) AddRowsInto(ctx, dw, partial);
  return dx;
}

// The weights in the dtype of the computation.
Tensor WideWeight(Context& ctx, const Tensor& w) {
  const DType wide = AccumulatorOf(w.dtype());
  return w.dtype() == wide ? w : Cast(ctx, w, wide);
}

}  // namespace

RmsNormResult RmsNormForward(Context& ctx, const Tensor& x, const Tensor& w, double eps) {
  CheckOperands("RmsNormForward", x, w);
  const bool wide_eps = AccumulatorOf(x.dtype()) == DType::kF64;
  LONGSPAN_CHECK((wide_eps ? eps : static_cast<double>(static_cast<float>(eps))) > 0 &&
                 std::isfinite(eps))
      << "RmsNormForward: eps " << eps;
  RmsNormResult result{ctx.Empty(x.shape(), x.dtype()),
                       ctx.Empty({x.dim(0)}, AccumulatorOf(x.dtype()))};
  const Tensor wide = WideWeight(ctx, w);
  LONGSPAN_ON_CUDA(ctx, internal::RmsNormForwardCuda(ctx, x, wide, eps, result));
  DispatchFloat(x.dtype(), "RmsNormForward",
                [&]<class T>() { Forward<T>(ctx, x, wide, eps, result); });
  return result;
}

Tensor RmsNormBackward(Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& w,
                       const Tensor& rstd, Tensor& dw) {
  CheckOperands("RmsNormBackward", x, w);
  const DType wide_dtype = AccumulatorOf(x.dtype());
  LONGSPAN_CHECK(dy.shape() == x.shape() && dy.dtype() == x.dtype())
      << "RmsNormBackward: dy is " << dy.Describe() << " for x " << x.Describe();
  LONGSPAN_CHECK(rstd.shape() == Shape({x.dim(0)}) && rstd.dtype() == wide_dtype)
      << "RmsNormBackward: rstd is " << rstd.Describe() << " for x " << x.Describe();
  LONGSPAN_CHECK(!dw.defined() || (dw.shape() == w.shape() && dw.dtype() == wide_dtype))
      << "RmsNormBackward: dw is " << dw.Describe() << " for w " << w.Describe();
  const Tensor wide = WideWeight(ctx, w);
  LONGSPAN_ON_CUDA(ctx, internal::RmsNormBackwardCuda(ctx, dy, x, wide, rstd, dw));
  return DispatchFloat(x.dtype(), "RmsNormBackward",
                       [&]<class T>() { return Backward<T>(ctx, dy, x, wide, rstd, dw); });
}

}  // namespace longspan::ops
