#include "ops/norm/rms_norm.h"

#include <cmath>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/elementwise.h"
#include "ops/norm/rms_norm_cuda.h"

namespace longspan::ops {
namespace {

constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kTokensPerPartial = 128;  // tokens behind one row of partial weight gradients

void CheckOperands(const char* op, const Tensor& x, const Tensor& w) {
  LONGSPAN_CHECK(x.rank() == 2 && x.dim(1) >= 1 && IsFloat(x.dtype()))
      << op << ": x is " << x.Describe() << ", not a float matrix";
  LONGSPAN_CHECK(w.rank() == 1 && w.dim(0) == x.dim(1) && IsFloat(w.dtype()) &&
                 AccumulatorOf(w.dtype()) == AccumulatorOf(x.dtype()))
      << op << ": w is " << w.Describe() << " for x " << x.Describe();
}

template <class T>
void Forward(Context& ctx, const Tensor& x, const Tensor& weight, double eps, RmsNormResult& out) {
  using Acc = Accumulator<T>;
  const int64_t width = x.dim(1);
  const T* in = x.data<T>();
  const Acc* w = weight.data<Acc>();
  T* y = out.y.data<T>();
  Acc* rstd = out.rstd.data<Acc>();
  const RowKernels<T>& rows = internal::Rows<T>(out.y.bytes());
  ParallelRanges(ctx, x.dim(0), kTokensPerTask, [&](int64_t begin, int64_t end) {
    rows.rms_norm(end - begin, width, in + begin * width, w, eps, y + begin * width, rstd + begin);
  });
}

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
  Acc* sums = partial.data<Acc>();
  const RowKernels<T>& rows = internal::Rows<T>(dx.bytes());
  ParallelRanges(ctx, tokens, kTokensPerPartial, [&](int64_t begin, int64_t end) {
    rows.rms_norm_backward(end - begin, width, dy + begin * width, in + begin * width, w,
                           rstd + begin, out + begin * width,
                           sums + begin / kTokensPerPartial * width);
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
