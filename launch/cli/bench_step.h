#pragma once
#include <string>
#include <vector>

#include "launch/bench/record.h"
#include "ops/core/context.h"

namespace longspan::launch {

// A configuration whose training step is timed.
struct StepCase {
  std::string name;  // of the file, with the context length
  std::string text;  // protobuf text
  std::string origin;
};

// The preset llama_1b_32k for an empty `file`.
// Errors: ConfigError when the file cannot be read
StepCase ReadStepCase(const std::string& file);

// Times whole optimizer steps of one rank on random tokens: forward and backward pass of one
// micro-batch, clipping, update. Layout, batch and device of the configuration are replaced by one
// rank, one micro-batch and the device of `ctx`; `sets` are --set arguments on top. No data is
// read.
//
//   pass      "both"; impl: the precision
//   flops     those of the MFU formula (attention: visible pairs; nothing for recomputation)
//   mfu       over what the maker of a GPU states; over the measured peak elsewhere
//   visible_fraction, block_fraction   means over the layers, for rows that are one document
//   attention_ms   of a step, the median: context attention with its recomputation; on a CPU
//   parameters, first_loss (of the first step, before any update), peak_bytes of tensors with
//             what was predicted (trainer/model/memory.h), the largest_tensor_bytes of one,
//             recompute (1: of layers, 2: of all in them but attention), peak_rss_bytes of the
//             process
// Two warm-up steps, or one that takes more than 10 s.
//
// Errors    those of a configuration; StepFailure when the loss is not finite
// What the table does not show: tokens/s, MFU and the keys above.
std::string StepText(const BenchRecord& record);

BenchRecord BenchStep(Context& ctx, const StepCase& problem, const std::vector<std::string>& sets,
                      const BenchOptions& options, const MachinePeaks& peaks);

}  // namespace longspan::launch
