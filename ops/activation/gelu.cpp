#include "ops/activation/gelu.h"

#include "ops/activation/activation_cuda.h"
#include "ops/activation/formulas.h"
#include "ops/core/dispatch.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
Tensor GeluForward(Context& ctx, const Tensor& x) {
  Tensor y = ctx.Empty(x.shape(), x.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::GeluForwardCuda(ctx, x, y));
  DispatchFloat(x.dtype(), "GeluForward", [&]<class T>() {
    using Acc = Accumulator<T>;
    internal::Map(
        ctx, x.numel(), y.data<T>(), [](Acc v) { return internal::GeluValue()(v); }, x.data<T>());
  });
  return y;
}

Tensor GeluBackward(Context& ctx, const Tensor& dy, const Tensor& x) {
  LONGSPAN_CHECK(dy.shape() == x.shape() && dy.dtype() == x.dtype())
      << "GeluBackward: dy " << dy.Describe() << " and x " << x.Describe();
  Tensor dx = ctx.Empty(x.shape(), x.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::GeluBackwardCuda(ctx, dy, x, dx));
  DispatchFloat(x.dtype(), "GeluBackward", [&]<class T>() {
    using Acc = Accumulator<T>;
    internal::Map(
        ctx, x.numel(), dx.data<T>(), [](Acc d, Acc v) { return internal::GeluSlope()(d, v); },
        dy.data<T>(), x.data<T>());
  });
  return dx;
}

}  // namespace longspan::ops
