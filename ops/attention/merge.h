#pragma once
#include <cmath>
#include <limits>

#include "ops/core/device_code.h"

namespace longspan::ops {

// How a row's results over two disjoint key sets combine: o = a * o + b * o2. A NaN of either lse
// reaches all three numbers.
template <class Real>
struct MergeWeights {
  Real a, b, lse;
  bool empty;  // neither part saw a key: o = 0 and lse = -inf
};

template <class Real>
LONGSPAN_HD MergeWeights<Real> WeightsOfParts(Real lse, Real lse2) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  // Not by the maximum, which drops a NaN.
  if (lse == -kInfinity && lse2 == -kInfinity) return {0, 0, -kInfinity, true};
  const Real top = lse < lse2 ? lse2 : lse;
  const Real a = std::exp(lse - top), b = std::exp(lse2 - top), sum = a + b;
  return {a / sum, b / sum, top + std::log(sum), false};
}

}  // namespace longspan::ops
