#pragma once
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "parallel/comm/counting.h"
#include "trainer/trainer.h"

namespace longspan::trainer {

// Category of the Context's Trace under which the progress function of a rank on the CPU adds up
// what it takes: while transfers are pending, that is waiting and no work of the rank's own.
inline constexpr const char* kProgressTime = "communication progress";

struct RunSettings {
  std::filesystem::path run_directory;
  // auto: from the newest checkpoint of the run directory, if there is one; never: from the start,
  // refused when checkpoints exist; else a checkpoint's path or the number of a step.
  std::string resume = "auto";
  std::string init_from;    // a checkpoint or run directory whose weights a new run starts from
  std::string config_text;  // resolved configuration, saved with the run
  // How long to wait for another job that holds the run directory: a killed one needs some seconds.
  std::chrono::milliseconds lock_wait = std::chrono::seconds(30);
  std::function<bool()> stop_requested;  // polled once a step and while waiting for the lock
  // Save, then validate, then end after the step in which this time since the start of RunTraining
  // is over (on a GPU after the next one, which has been issued by then); 0: no limit.
  double max_seconds = 0;
  // For tests that interrupt a save: limits the writer. 0: no limit.
  uint64_t checkpoint_bytes_per_second = 0;
  double peak_flops = 0;  // of all ranks together; 0: unknown, mfu is null
  bool quiet = false;     // no progress lines
  // Where to write a Chrome trace of the first `trace_steps` steps of this process; empty: none.
  std::filesystem::path trace_file;
  int64_t trace_steps = 3;
};

struct RunSummary {
  int64_t step = 0;                 // steps done
  bool stopped = false;             // by request, before run.steps
  std::optional<double> last_loss;  // none: there was no step left to do
  std::optional<double> validation_loss;
  double seconds = 0;                  // in steps, this process
  std::optional<double> tokens_per_s;  // over those
  int64_t skipped_steps = 0;
  // Of the time in steps, on rank 0. On a GPU of every 16th step, on its own clock; none when no
  // step was timed.
  std::optional<double> attention_share;
  std::optional<double> wait_share;  // waiting for other ranks
};

// Trains from where the run directory stands to options.steps, or until a stop is requested:
// metrics, validation, checkpoints, at their cadence. Collective over mesh.world(), which must be
// `counted`. Errors are thrown on all ranks alike where one rank can meet them alone.
RunSummary RunTraining(Context& ctx, parallel::DeviceMesh& mesh,
                       parallel::CountingCommunicator& counted, const TrainOptions& options,
                       const RunSettings& settings);

}  // namespace longspan::trainer
