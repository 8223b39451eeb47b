#pragma once
#include "ops/core/device_code.h"
#include "ops/elementwise/exp.h"

// The activations per element, for host and device.
namespace longspan::ops::internal {

// y = silu(gate) up
struct SwiGluValue {
  template <class Real>
  LONGSPAN_HD_INLINE Real operator()(Real gate, Real up) const {
    return gate * Sigmoid(gate) * up;
  }
};

// dup = dy silu(g),  dgate = dy up silu'(g) with silu'(g) = s + g s (1 - s), s = sigmoid(g).
struct SwiGluSlopes {
  template <class Real>
  LONGSPAN_HD_INLINE void operator()(Real& dgate, Real& dup, Real dy, Real gate, Real up) const {
    const Real s = Sigmoid(gate), silu = gate * s;
    dgate = dy * up * (s + silu * (Real(1) - s));
    dup = dy * silu;
  }
};

// y = x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3), because 1 + tanh(u) = 2 sigmoid(2 u);
// no cancellation for negative x.
struct GeluValue {
  static constexpr double kTwoSqrt = 1.5957691216057308;  // 2 sqrt(2 / pi)
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kCubic = 0.044715;

  // Beyond +-10 the gate is within 1.3e-38 of 0 or 1; without the limit x^2 would overflow in f32
  // and 0 * infinity make a NaN. At 10 its argument to base 2 is 125.97. NaN passes.
  template <class Real>
  static LONGSPAN_HD_INLINE Real Limited(Real x) {
    return Min(Real(10), Max(Real(-10), x));
  }
  template <class Real>
  static LONGSPAN_HD_INLINE Real Gate(Real limited) {
    const Real square = limited * limited;
    return SigmoidBase2(
        limited * MultiplyAdd(Real(kTwoSqrt * kLog2E * kCubic), square, Real(kTwoSqrt * kLog2E)));
  }
  template <class Real>
  LONGSPAN_HD_INLINE Real operator()(Real x) const {
    const Real above = Max(Real(-10), x);  // or what is left of the gate would be multiplied by x
    return above * Gate(Min(Real(10), above));
  }
};

struct GeluSlope {
  template <class Real>
  LONGSPAN_HD_INLINE Real operator()(Real dy, Real value) const {
    const Real x = GeluValue::Limited(value), s = GeluValue::Gate(x);
    const Real slope = MultiplyAdd(Real(3 * GeluValue::kTwoSqrt * GeluValue::kCubic) * x, x,
                                   Real(GeluValue::kTwoSqrt));
    return dy * MultiplyAdd(x * s * (Real(1) - s), slope, s);
  }
};

}  // namespace longspan::ops::internal
