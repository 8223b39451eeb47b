#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>

#include "trainer/metrics/metrics.h"

namespace longspan::trainer {

class FileWriter;

// metrics.jsonl: one JSON object a line, handed to the system line by line, so that a killed run
// keeps all complete lines.
//
//   step        {"step", "loss", "grad_norm", "lr", "tokens", "valid_tokens", "step_ms",
//                "tokens_per_s", "mfu", "work_max_over_mean", "comm_bytes", "control_bytes",
//                "strategies": {NAME: {"bytes", "exposed_ms"}}, "plan_ms",
//                "context_work_max_over_mean", "peak_rss_bytes", "peak_device_bytes",
//                "peak_device_memory": {"activations", "parameters", "gradients", "optimizer",
//                "workspace", "staging", "attention", "communication"}}
//   evaluation  {"step", "eval", "value"}
//
// Numbers are printed so that reading them gives the same bits back. JSON has no NaN or infinity:
// such values, and an unknown mfu, are null.
//
// Errors: CheckpointError naming the file and the system's reason, or the line that is not a
// metrics object; the file is then unchanged.
class JsonlSink {
 public:
  // Continues `path` after cutting it back to lines with step <= `last_step` (-1: to nothing), in
  // one rename. An incomplete last line, left by a kill, goes as well.
  JsonlSink(const std::filesystem::path& path, int64_t last_step);
  ~JsonlSink();

  void Write(const StepMetrics& metrics);
  void Write(const EvalMetrics& metrics);

 private:
  std::unique_ptr<FileWriter> file_;
};

}  // namespace longspan::trainer
