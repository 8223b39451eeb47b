#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace longspan::trainer {

// The folder that holds a run's checkpoints. Names in it:
//   step_00001000             a checkpoint; it counts when its manifest and file sizes are right
//   step_00001000.tmp         being written, or left by a crash; never read
//   step_00001000.replaced    the former checkpoint of a step that is being saved again; read only
//                             while step_00001000 itself is not usable
//   step_00001000.deleting    on its way out; never read
//   step_00001000.superseded  set aside by SetAsideNewerThan; never read
// None of these functions communicates: rank 0 calls them and tells the others.

std::string StepDirectoryName(int64_t step);  // "step_00001000"

// Newest committed checkpoint of `directory`, by step number; nothing when there is none or the
// folder does not exist. Reads manifests and file sizes, not payloads. Adds one sentence to
// `skipped` for each newer one that is not usable.
//
// Errors: CheckpointError when there are checkpoints but none is usable, because starting over in
// silence would hide the loss.
std::optional<std::filesystem::path> FindLatest(const std::filesystem::path& directory,
                                                std::vector<std::string>* skipped = nullptr);

// The checkpoint that a user means by `path`: itself, or the newest one of a run directory or of a
// checkpoints folder.
//
// Errors: CheckpointError naming the path and the checkpoints that exist beside it.
std::filesystem::path ResolveCheckpoint(const std::filesystem::path& path);

// Why `checkpoint` is not a committed checkpoint; empty when it is one.
std::string WhyNotCommitted(const std::filesystem::path& checkpoint);

// Removes what a crashed job left (.tmp, .deleting) and settles .replaced ones. The caller must
// hold the run's lock.
void CleanLeftovers(const std::filesystem::path& directory);

// Renames checkpoints of later steps than `step` to .superseded. For a run that is resumed from an
// older checkpoint on request: otherwise the abandoned later ones would count as the newest.
// Returns the new paths.
std::vector<std::filesystem::path> SetAsideNewerThan(const std::filesystem::path& directory,
                                                     int64_t step);

struct RetentionPolicy {
  int keep_last = 3;       // newest checkpoints to keep, >= 1
  int64_t keep_every = 0;  // keep steps divisible by this for ever; 0 keeps none
};

// Takes the committed checkpoints that `policy` does not keep out of the folder, by renaming them
// to .deleting, and returns the new names for the caller to remove. `newest` (just committed)
// always stays and steps after it are left alone. Unusable ones are neither counted nor touched. A
// rename that fails is logged and skipped.
std::vector<std::filesystem::path> RetireCheckpoints(const std::filesystem::path& directory,
                                                     int64_t newest, const RetentionPolicy& policy);

// Removes a tree; a failure is logged.
void RemoveTree(const std::filesystem::path& path) noexcept;

}  // namespace longspan::trainer
