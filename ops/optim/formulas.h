#pragma once
#include <cfloat>
#include <cmath>

#include "ops/core/device_code.h"
#include "ops/optim/step_control.h"

// The optimizer per step, for host and device.
namespace longspan::ops::internal {

// By magnitude: x - x == 0 is true only where the compiler has not fused the product behind x into
// the subtraction.
LONGSPAN_HD inline bool Finite(double x) { return std::fabs(x) <= DBL_MAX; }

struct Square {
  LONGSPAN_HD double operator()(double x) const { return x * x; }
};
struct NotFinite {
  LONGSPAN_HD double operator()(double x) const { return Finite(x) ? 0 : 1; }
};

// step_control.h. `record` holds the last step's and receives this one's.
LONGSPAN_HD inline void DecideStep(const double* sums, double squares, double clip_norm,
                                   double skips_allowed, double* record) {
  // A step without any label has gradient zero; it must not turn into 0 / 0.
  const double valid = sums[2], mean = valid > 0 ? 1.0 / valid : 0.0;
  const double loss = sums[0] * mean, norm = std::sqrt(squares) * mean;
  const bool finite = Finite(loss + sums[1]) && Finite(norm);
  double scale = mean;
  if (clip_norm > 0 && norm > clip_norm) scale *= clip_norm / norm;
  if (!finite) {
    record[kStepSkips] += 1;
    if (record[kStepSkips] > skips_allowed) record[kStepStopped] = 1;
  }
  record[kStepGradScale] = scale;
  record[kStepApply] = finite && valid > 0 && record[kStepStopped] == 0 ? 1 : 0;
  record[kStepFinite] = finite ? 1 : 0;
  record[kStepLoss] = loss;
  record[kStepGradNorm] = norm;
}

}  // namespace longspan::ops::internal
