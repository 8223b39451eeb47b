#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/sampler.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/reader.h"
#include "trainer/eval/loss.h"
#include "trainer/step.h"

namespace longspan::trainer {

// One rank's half of a training run without its cadence: model state, data position, one step at a
// time, what a checkpoint holds. The loop (loop.h) decides when to do what.
class Trainer {
 public:
  // Opens datasets, checks the vocabulary and that all ranks see the same data, initialises weights
  // from the seed. Errors of one rank are raised on all.
  Trainer(Context& ctx, parallel::DeviceMesh& mesh, const TrainOptions& options);
  ~Trainer();

  // Steps begun so far: the next one is this one, counted from 0.
  int64_t step() const { return step_; }
  int64_t skipped_steps() const { return skipped_steps_; }
  ParameterStore& parameters() { return store_; }
  const TrainOptions& options() const { return options_; }

  // One step: BeginStep, FinishStep.
  StepResult Step(const std::function<RankNote()>& note = nullptr);
  // Issues the next step; on a GPU without waiting for it. `note`: see TrainStep.
  PendingStep BeginStep(const std::function<RankNote()>& note = nullptr);
  // Its result, in the order of BeginStep. Checkpoints and evaluations need every step finished.
  // Throws StepFailure for a step that ends the run, which includes having skipped more steps than
  // the policy allows.
  StepResult FinishStep(PendingStep pending);
  // Mean validation loss; only with validation data.
  EvaluationLoss Evaluate();

  // What a checkpoint of this moment says and holds; tensors are the live ones, with ZeRO those of
  // this rank's parts.
  CheckpointInfo Info(const std::string& config_text) const;
  std::vector<NamedTensor> State();
  // Continues where `reader`'s run stopped. Refuses, by field, one with another model, seed, batch
  // or corpus; the text says how to start a new run from its weights instead.
  void Resume(const CheckpointReader& reader);
  // Also writes what the loader's thread does into `recorder`; nullptr ends that.
  void Record(std::shared_ptr<TraceRecorder> recorder);
  // Takes the weights only: a new run that starts at step 0. Gates may be missing on either side.
  // Returns a note of what was done for the log.
  std::string InitFrom(const CheckpointReader& reader);

 private:
  void OpenData();
  void StartLoader();
  std::vector<int64_t> DealStep(int64_t first) const;
  Context& ctx_;
  parallel::DeviceMesh& mesh_;
  const TrainOptions options_;
  std::unique_ptr<parallel::ShardGroups> groups_;  // null: every rank holds all state
  ParameterStore store_;
  TrainStep train_step_;
  std::unique_ptr<data::RowSampler> train_, validation_;
  std::unique_ptr<BatchBuilder> train_builder_, validation_builder_;
  std::unique_ptr<data::Loader> loader_;  // last: its thread uses what is above
  int64_t step_ = 0, skipped_steps_ = 0;
};

// Mean loss of a checkpoint's weights over options.validation (`rows` of it, 0 = all). Collective.
EvaluationLoss EvaluateCheckpoint(Context& ctx, parallel::DeviceMesh& mesh,
                                  const TrainOptions& options, const CheckpointReader& reader,
                                  int64_t rows);

}  // namespace longspan::trainer
