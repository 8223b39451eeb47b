#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// What a step may do to the weights, decided on the device that holds its sums, so that the host
// need not wait for them between backward pass and update:
//   mean = 1 / valid (0 without valid tokens),  loss = mean * loss_sum,  grad_norm = mean *
//   sqrt(squares),  grad_scale = mean, times clip_norm / grad_norm where that is larger than
//   clip_norm > 0.
// The step is applied when loss, z-loss and norm are finite, there is a valid token, and the run
// has not been stopped. A step that is not finite counts as skipped; more than `skips_allowed` of
// them stop the run, and no later step is applied: the host may have enqueued some before it
// learns.
//
// Shapes    sums f64 [>= 3]: loss, z-loss and valid tokens, summed over all ranks; squares f64 [1]:
//           of the gradient of the summed loss; record f64 [kStepFields]
// Numerics  f64; the same bits on every device
// Errors    InvalidArgument naming the tensor or option
// Devices   cpu, cuda
enum StepField {
  kStepGradScale,  // for AdamWStep; meaningless when the step is not applied
  kStepApply,      // 1 or 0
  kStepFinite,     // 1 or 0
  kStepLoss,       // nats per valid token
  kStepGradNorm,   // before clipping
  kStepSkips,      // steps that were not finite so far, this one included
  kStepStopped,    // 1 from the step on that was one too many
  kStepFields
};
struct StepControlOptions {
  double clip_norm = 0;      // 0: no clipping
  double skips_allowed = 0;  // steps that may be skipped in the whole run
};

// A record for the first step: `skips` steps have been skipped before (a resumed run).
Tensor MakeStepRecord(Context& ctx, double skips = 0);

// Turns the record of the last step into that of this one.
void StepControl(Context& ctx, const Tensor& sums, const Tensor& squares,
                 const StepControlOptions& options, Tensor& record);

}  // namespace longspan::ops
