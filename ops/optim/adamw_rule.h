#pragma once
#include <cmath>

#include "ops/elementwise/exp.h"

namespace longspan::ops::internal {

// AdamW (adamw.h) with what does not depend on the element computed once.
template <class Real>
struct AdamWRule {
  Real beta1, rest1, beta2, rest2, correct1, correct2, eps, lr, decay;

  LONGSPAN_HD_INLINE void operator()(Real g, Real& p, Real& first, Real& second) const {
    const Real m = beta1 * first + rest1 * g;
    const Real v = beta2 * second + rest2 * (g * g);
    first = m;
    second = v;
    p -= lr * (m * correct1 / (std::sqrt(v * correct2) + eps) + decay * p);
  }
};

}  // namespace longspan::ops::internal
