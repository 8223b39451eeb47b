#pragma once
#include <cstdint>

namespace longspan::trainer {

enum class ScheduleKind { kConstant, kCosine, kWsd };
enum class DecayShape { kLinear, kOneMinusSqrt };

// Learning rate over a run. Warm-up rises linearly: step i (from 0) uses (i + 1) / warmup of the
// peak.
//   constant  stays at the peak
//   cosine    half a cosine from the peak to final_fraction of it at the last step
//   wsd       stays at the peak, then falls to final_fraction over the last decay_steps
//             (1 - sqrt(progress), arXiv 2405.18392, or linear)
struct ScheduleOptions {
  ScheduleKind kind = ScheduleKind::kConstant;
  int64_t warmup_steps = 0;
  int64_t decay_steps = 0;    // wsd
  double final_fraction = 0;  // of the peak
  DecayShape decay_shape = DecayShape::kOneMinusSqrt;
};

// The learning rate of 0-based `step` of `steps`.
double LearningRate(const ScheduleOptions& options, double peak, int64_t step, int64_t steps);

}  // namespace longspan::trainer
