#pragma once
#include <cstdint>
#include <functional>

#include "data/loader.h"
#include "parallel/mesh/device_mesh.h"
#include "parallel/zero/grad_reducer.h"
#include "trainer/batch.h"
#include "trainer/options.h"

namespace longspan::trainer {

struct StepResult {
  double loss = 0;       // nats per valid token, over all ranks; without z-loss
  double grad_norm = 0;  // of the mean loss, before clipping
  double lr = 0;
  int64_t tokens = 0;           // input tokens of the step
  int64_t valid_tokens = 0;     // those with a label
  double flops = 0;             // of the MFU formula: matmuls and visible attention pairs
  bool skipped = false;         // not finite, weights untouched
  bool stop_requested = false;  // by any rank, for whatever reason
  bool time_is_up = false;      // some rank's reason was the time limit
};

// Why this rank wants to stop after the step.
enum class StopWish { kNone, kSignal, kTimeUp };

// A step that ends the run, thrown on all ranks alike: what was saved before it is good, and a save
// under way can be completed.
class StepFailure : public Error {
  using Error::Error;
};

// One optimizer step: accumulates gradients of the summed loss over micro-batches, reduces them
// over all ranks while the last backward pass runs, divides once by the global number of valid
// tokens, clips, updates. All ranks leave with the same weights and the same result.
//
// A loss or gradient norm that is not finite changes no weight: the policy STOP throws StepFailure,
// SKIP reports the step as skipped.
class TrainStep {
 public:
  TrainStep(Context& ctx, parallel::DeviceMesh& mesh, const TrainOptions& options,
            ParameterStore& store);

  // `step` counts from 0 and decides learning rate and bias correction. `wish` is asked when the
  // step's gradients are done, so that a long step in which the wish comes up is the last one.
  StepResult Run(data::Loader& loader, int64_t step, const std::function<StopWish()>& wish);

 private:
  void Update(int64_t step, double lr, double grad_scale);

  Context& ctx_;
  parallel::DeviceMesh& mesh_;
  const TrainOptions& options_;
  ParameterStore& store_;
  const double matmul_flops_per_token_;
};

}  // namespace longspan::trainer
