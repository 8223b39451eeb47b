#pragma once
#include "ops/core/device_code.h"

namespace longspan::ops {

// p = 1 / (1 + exp(-x)) and its derivative p (1 - p), from e = exp(-|x|): nothing overflows, and
// nothing cancels where p is near 1. Of x only the sign counts, so that x and e may be of any unit.
// NaN gives NaN.
template <class Real>
struct Logistic {
  Real p, slope;
};

// r = 1 / (1 + e), from instructions of the caller.
template <class Real>
LONGSPAN_HD Logistic<Real> LogisticOf(Real x, Real e, Real r) {
  return {x < 0 ? e * r : r, e * r * r};
}

template <class Real>
LONGSPAN_HD Logistic<Real> LogisticOf(Real x, Real e) {
  return LogisticOf(x, e, Real{1} / (Real{1} + e));
}

}  // namespace longspan::ops
