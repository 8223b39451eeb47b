#include "ops/gemm/linear.h"

#include "ops/gemm/gemm.h"

namespace longspan::ops {
namespace {

void CheckOperands(const char* op, const Tensor& x, const Tensor& w) {
  LONGSPAN_CHECK(x.rank() == 2 && w.rank() == 2 && x.dim(1) == w.dim(1))
      << op << ": x " << x.Describe() << " and w " << w.Describe() << " do not fit (y = x w^T)";
}

}  // namespace

Tensor LinearForward(Context& ctx, const Tensor& x, const Tensor& w) {
  CheckOperands("LinearForward", x, w);
  Tensor y = ctx.Empty({x.dim(0), w.dim(0)}, x.dtype());
  Gemm(ctx, x, false, w, true, y);
  return y;
}

Tensor LinearBackward(Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& w, Tensor& dw,
                      bool want_dx) {
  CheckOperands("LinearBackward", x, w);
  LONGSPAN_CHECK(
      dy.shape() == Shape({x.dim(0), w.dim(0)}) &&
      (!dw.defined() || (dw.shape() == w.shape() && dw.dtype() == AccumulatorOf(x.dtype()))))
      << "LinearBackward: dy " << dy.Describe() << " and dw " << dw.Describe() << " for x "
      << x.Describe() << " and w " << w.Describe();
  if (dw.defined()) Gemm(ctx, dy, true, x, false, dw, {.accumulate = true});
  if (!want_dx) return {};
  Tensor dx = ctx.Empty(x.shape(), x.dtype());
  Gemm(ctx, dy, false, w, false, dx);
  return dx;
}

}  // namespace longspan::ops
