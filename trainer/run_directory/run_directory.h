#pragma once
#include <chrono>
#include <filesystem>
#include <memory>
#include <string>

#include "ops/core/error.h"

namespace longspan::trainer {

// Another job holds the run directory.
class RunDirectoryInUse : public CheckpointError {
  using CheckpointError::CheckpointError;
};

// Keeps every other process out of a directory while it lives: an exclusive flock on a file that
// also says who holds it. The kernel drops the lock when the process ends in whatever way, so a
// lock file left behind by a killed job blocks nobody.
//
// Errors: RunDirectoryInUse naming host and process of the holder when it does not let go within
// `wait`; CheckpointError with the path and the system's reason when the file cannot be made.
class RunLock {
 public:
  RunLock(const std::filesystem::path& file, std::chrono::milliseconds wait);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int descriptor_ = -1;
};

// Names of everything in a run's directory. Making one has no effect on disk, so all ranks do;
// only rank 0 claims it.
class RunDirectory {
 public:
  explicit RunDirectory(std::filesystem::path path) : path_(std::move(path)) {}

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path config_file() const { return path_ / "config.textproto"; }
  std::filesystem::path metrics_file() const { return path_ / "metrics.jsonl"; }
  std::filesystem::path lock_file() const { return path_ / "lock"; }
  std::filesystem::path checkpoints() const { return path_ / "checkpoints"; }
  std::filesystem::path log() const { return path_ / "log"; }
  std::filesystem::path plots() const { return path_ / "plots"; }

  // Creates the directory with checkpoints/, log/ and plots/ and holds its lock until this object
  // goes. A killed job needs some seconds to be gone, hence the wait. Changes nothing that is
  // there already. Rank 0 calls this; the others learn the outcome through the communicator
  // (parallel::FirstError).
  //
  // Errors: RunDirectoryInUse when another job holds it, CheckpointError when it cannot be created
  // or written.
  void Claim(std::chrono::milliseconds wait = std::chrono::seconds(30));
  bool claimed() const { return lock_ != nullptr; }

  // Replaces config.textproto by `text` in one step. Only after Claim.
  void WriteConfig(const std::string& text) const;

 private:
  std::filesystem::path path_;
  std::unique_ptr<RunLock> lock_;
};

}  // namespace longspan::trainer
