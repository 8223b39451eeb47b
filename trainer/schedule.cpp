#include "trainer/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace longspan::trainer {

double LearningRate(const ScheduleOptions& o, double peak, int64_t step, int64_t steps) {
  if (step < o.warmup_steps) {
    return peak * static_cast<double>(step + 1) / static_cast<double>(o.warmup_steps);
  }
  // Progress through a phase that starts at step `begin` and reaches 1 at the last step of the run.
  auto progress = [&](int64_t begin) {
    const int64_t length = std::max<int64_t>(1, steps - 1 - begin);
    return std::clamp(static_cast<double>(step - begin) / static_cast<double>(length), 0.0, 1.0);
  };
  double height = 1.0;  // 1 at the peak, 0 at the end
  switch (o.kind) {
    case ScheduleKind::kConstant:
      return peak;
    case ScheduleKind::kCosine:
      height = 0.5 * (1.0 + std::cos(std::numbers::pi * progress(o.warmup_steps)));
      break;
    case ScheduleKind::kWsd: {
      const int64_t begin = steps - 1 - o.decay_steps;
      if (step <= begin || o.decay_steps == 0) return peak;
      const double p = progress(begin);
      height = o.decay_shape == DecayShape::kLinear ? 1.0 - p : 1.0 - std::sqrt(p);
      break;
    }
  }
  return peak * (o.final_fraction + (1.0 - o.final_fraction) * height);
}

}  // namespace longspan::trainer
