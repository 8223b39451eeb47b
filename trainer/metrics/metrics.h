#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace longspan::trainer {

// What attention of one strategy moved in a step, where several ranks share rows.
struct StrategyMetrics {
  std::string name;   // "exchange"
  int64_t bytes = 0;  // sent by all ranks
  // The rank that waited longest for its transfers; not known on a GPU, where the host never waits.
  std::optional<double> exposed_ms;
};

// What one optimizer step reports. Values are of the whole job, not of one rank.
struct StepMetrics {
  int64_t step = 0;  // steps done, so the first one reports 1
  double loss = 0;   // of the objective, mean over valid tokens; next_token: nats
  std::string objective = "next_token";  // what the loss is (trainer/objective.h)
  std::optional<double> mean_gate;       // mean of the trained gates, where there are such
  double grad_norm = 0;                  // global L2 norm before clipping
  double lr = 0;                         // learning rate of this step
  int64_t tokens = 0;                    // tokens of this step's global batch
  int64_t valid_tokens = 0;              // those with a label
  double step_ms = 0;                    // wall time of the step
  double tokens_per_s = 0;
  std::optional<double> mfu;  // fraction of the device's peak, 0..1; none when unknown
  // Attention of the rank that had most of it, in (query, key, head) triples of all layers, over
  // the mean of the ranks: 1 when all had the same.
  double work_max_over_mean = 1;
  int64_t comm_bytes = 0;                   // sent by all ranks in this step, but for
  int64_t control_bytes = 0;                // summaries, requests and fingerprints
  std::vector<StrategyMetrics> strategies;  // those that moved something
  // A rank's loader placed the step's tokens and planned its attention, one step ahead (mean).
  double plan_ms = 0;
  // Attention of the busiest context-parallel rank over the mean.
  double context_work_max_over_mean = 1;
  int64_t peak_rss_bytes = 0;  // largest of all ranks since their start
  // Most memory that tensors held at once on the run's device (a GPU's, or the host's), of the rank
  // with the most, and what it was for at that moment: adds up to it. In order of the categories of
  // ops/core/allocator.h; the names are theirs.
  int64_t peak_device_bytes = 0;
  std::vector<std::pair<std::string, int64_t>> peak_device_memory;
};

// One result of an evaluation after `step` steps.
struct EvalMetrics {
  int64_t step = 0;
  std::string eval;  // "validation_loss", "passkey@8192"
  double value = 0;
};

// Largest resident memory of this process so far.
int64_t PeakRssBytes();

}  // namespace longspan::trainer
