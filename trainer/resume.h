#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "trainer/run_directory/run_directory.h"

namespace longspan::trainer {

// What --resume means for a run directory: the checkpoint to continue from, or nothing for a fresh
// start. Rank 0 decides for all. `notes` receives a sentence for each checkpoint that was passed
// over.
//
// Errors: CheckpointError when a named checkpoint does not exist (listing those that do), when
// "never" would start a second run among existing checkpoints, or when none is usable.
std::optional<std::filesystem::path> DecideResume(const RunDirectory& directory,
                                                  const std::string& resume,
                                                  std::vector<std::string>* notes);

}  // namespace longspan::trainer
