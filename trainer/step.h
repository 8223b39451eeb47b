#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "data/loader.h"
#include "ops/core/cuda/backend.h"
#include "parallel/mesh/device_mesh.h"
#include "trainer/batch.h"
#include "trainer/gradients.h"
#include "trainer/objective.h"
#include "trainer/options.h"

namespace longspan::trainer {

struct StepResult {
  int64_t step = 0;                 // steps begun up to this one: the first reports 1
  double loss = 0;                  // the objective per valid token, over all ranks; without z-loss
  double grad_norm = 0;             // of the mean loss, before clipping
  std::optional<double> mean_gate;  // duo gates: the mean of alpha before the step
  double lr = 0;
  int64_t tokens = 0;        // input tokens of the step
  int64_t valid_tokens = 0;  // those with a label
  double plan_ms = 0;        // a rank's loader made the plans of the step's micro-batches (mean)
  // Attention of the busiest cp rank over the mean of ranks, over layers and micro-batches.
  double context_work_max_over_mean = 1;
  double flops = 0;             // of the MFU formula: matmuls and visible attention pairs
  double seconds = 0;           // on a GPU by its own clock
  bool skipped = false;         // not finite, weights untouched
  bool stop_requested = false;  // by any rank, for whatever reason
  bool time_is_up = false;      // some rank's reason was the time limit
  std::vector<double> notes;    // the values of RankNote, rank after rank
  // Attention of the rank that has most of it, in evaluated pairs, over the mean of all ranks.
  double work_max_over_mean = 1;
};

// Why this rank wants to stop after the step.
enum class StopWish { kNone, kSignal, kTimeUp };

// What a rank tells the others with the sums of a step.
struct RankNote {
  StopWish wish = StopWish::kNone;
  std::vector<double> values;  // finite; equally many on all ranks and in all steps
};

// A step that ends the run, thrown on all ranks alike: what was saved before it is good, and a save
// under way can be completed. Steps begun after it have changed nothing.
class StepFailure : public Error {
  using Error::Error;
};

// A step whose work has been issued. On a GPU it may still be running.
class PendingStep {
 public:
  // What of a step is on its way to the host; TrainStep reuses it afterwards.
  struct Slot {
    std::unique_ptr<cuda::Readback> report;  // these three are for a GPU
    size_t report_bytes = 0;
    std::unique_ptr<cuda::Mark> begin, end;
    parallel::Work sums;  // the last operation among ranks
    std::vector<double> host_report;
    double host_seconds = 0;
  };

 private:
  friend class TrainStep;
  int64_t step_ = 0;
  double lr_ = 0;
  std::shared_ptr<Slot> slot_;
};

// One optimizer step: accumulates gradients of the summed objective over micro-batches, reduces
// them over all ranks while the last backward pass runs, divides once by the global number of valid
// tokens, clips, updates. All ranks leave with the same weights and the same result.
//
// Begin never waits for a GPU: sums, clipping and the decision not to apply a step stay there, and
// the host reads them when it asks for the result, best after it has begun the next step.
//
// A loss or gradient norm that is not finite changes no weight: under the policy STOP, and under
// SKIP when it happens more than run.max_skipped_steps times, no later step does either.
class TrainStep {
 public:
  TrainStep(Context& ctx, parallel::DeviceMesh& mesh, const TrainOptions& options,
            ParameterStore& store);

  // `step` counts from 0 and decides learning rate and bias correction. `note` is asked when the
  // step's gradients have been summed (on a GPU: issued), so that a long step in which a wish comes
  // up is the last one (on a GPU: the one after it).
  PendingStep Begin(data::Loader& loader, int64_t step, const std::function<RankNote()>& note);
  // Waits for the step. Once for each, in order. Throws StepFailure for one that is not finite
  // under STOP; under SKIP that is `skipped`, and counting is up to the caller. Throws CommError
  // for one whose sums over ranks failed, or in which ranks that share rows had different plans.
  StepResult Finish(PendingStep pending);

  // Steps skipped before the next one: those of the run that is resumed.
  void SetSkippedSteps(int64_t steps);

 private:
  void Prepare(size_t values);
  std::shared_ptr<PendingStep::Slot> FreeSlot();
  void Backward(data::Loader& loader, GradientExchange& exchange, std::vector<double>& host);
  parallel::Work Reduce(const RankNote& note, std::vector<double>& host);
  Tensor Squares() const;
  void AddSquares();
  void CheckPlans(const BatchPlans& plans);
  void Update(int64_t step, double lr);

  Context& ctx_;
  parallel::DeviceMesh& mesh_;
  const TrainOptions& options_;
  ParameterStore& store_;
  const ObjectiveFlops flops_;
  const bool on_gpu_;
  // On the device: the sums over ranks (of the losses, of the squares of the gradients, of what
  // hosts know) and the record of ops/optim/step_control.h, side by side for one copy to the host.
  Tensor report_;
  size_t values_ = 0;  // of a RankNote
  bool plans_checked_ = false;
  uint64_t plans_ = 0;  // fingerprint of the step's plans, in as many bits as f64 holds
  std::vector<std::shared_ptr<PendingStep::Slot>> slots_;
};

}  // namespace longspan::trainer
