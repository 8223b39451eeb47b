#include "ops/activation/swiglu.h"

#include "ops/elementwise/exp.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
namespace {

void CheckSame(const char* op, const Tensor& a, const Tensor& b) {
  LONGSPAN_CHECK(a.shape() == b.shape() && a.dtype() == b.dtype())
      << op << ": operands " << a.Describe() << " and " << b.Describe();
}

}  // namespace

Tensor SwiGluForward(Context& ctx, const Tensor& gate, const Tensor& up) {
  CheckSame("SwiGluForward", gate, up);
  Tensor y = ctx.Empty(gate.shape(), gate.dtype());
  DispatchFloat(gate.dtype(), "SwiGluForward", [&]<class T>() {
    using Acc = Accumulator<T>;
    internal::Map(
        ctx, gate.numel(), y.data<T>(),
        [](Acc g, Acc u) { return g * internal::Sigmoid(g) * u; }, gate.data<T>(), up.data<T>());
  });
  return y;
}

SwiGluGradients SwiGluBackward(Context& ctx, const Tensor& dy, const Tensor& gate,
                               const Tensor& up) {
  CheckSame("SwiGluBackward", gate, up);
  CheckSame("SwiGluBackward", gate, dy);
  SwiGluGradients out{ctx.Empty(gate.shape(), gate.dtype()), ctx.Empty(up.shape(), up.dtype())};
  DispatchFloat(gate.dtype(), "SwiGluBackward", [&]<class T>() {
    using Acc = Accumulator<T>;
    // silu'(g) = s + g s (1 - s) with s = sigmoid(g).
    internal::Map(
        ctx, gate.numel(), out.dgate.data<T>(),
        [](Acc d, Acc g, Acc u) {
          const Acc s = internal::Sigmoid(g);
          return d * u * (s + g * s * (Acc(1) - s));
        },
        dy.data<T>(), gate.data<T>(), up.data<T>());
    internal::Map(
        ctx, gate.numel(), out.dup.data<T>(),
        [](Acc d, Acc g) { return d * (g * internal::Sigmoid(g)); }, dy.data<T>(), gate.data<T>());
  });
  return out;
}

}  // namespace longspan::ops
