#include "ops/activation/gelu.h"

#include <numbers>

#include "ops/elementwise/exp.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
namespace {

// y = x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3), because 1 + tanh(u) = 2 sigmoid(2 u);
// no cancellation for negative x.
constexpr double kTwoSqrt = 2 * std::numbers::sqrt2 * std::numbers::inv_sqrtpi;
constexpr double kCubic = 0.044715;

// The gate is 0 or 1 in every dtype long before +-20; without the limit x^2 would overflow in f32
// and 0 * infinity make a NaN. NaN passes.
template <class Real>
Real Limited(Real x) {
  x = x < Real(-20) ? Real(-20) : x;
  return x > Real(20) ? Real(20) : x;
}

template <class Real>
Real Gate(Real limited) {
  const Real square = limited * limited;
  return internal::Sigmoid(limited * (Real(kTwoSqrt) + Real(kTwoSqrt * kCubic) * square));
}

}  // namespace

Tensor GeluForward(Context& ctx, const Tensor& x) {
  Tensor y = ctx.Empty(x.shape(), x.dtype());
  DispatchFloat(x.dtype(), "GeluForward", [&]<class T>() {
    using Acc = Accumulator<T>;
    internal::Map(
        ctx, x.numel(), y.data<T>(), [](Acc v) { return v * Gate(Limited(v)); }, x.data<T>());
  });
  return y;
}

Tensor GeluBackward(Context& ctx, const Tensor& dy, const Tensor& x) {
  LONGSPAN_CHECK(dy.shape() == x.shape() && dy.dtype() == x.dtype())
      << "GeluBackward: dy " << dy.Describe() << " and x " << x.Describe();
  Tensor dx = ctx.Empty(x.shape(), x.dtype());
  DispatchFloat(x.dtype(), "GeluBackward", [&]<class T>() {
    using Acc = Accumulator<T>;
    internal::Map(
        ctx, x.numel(), dx.data<T>(),
        [](Acc d, Acc v) {
          const Acc x = Limited(v), s = Gate(x);
          const Acc slope = Acc(kTwoSqrt) + Acc(3 * kTwoSqrt * kCubic) * x * x;
          return d * (s + x * s * (Acc(1) - s) * slope);
        },
        dy.data<T>(), x.data<T>());
  });
  return dx;
}

}  // namespace longspan::ops
