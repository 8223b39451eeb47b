#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "parallel/comm/communicator.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/directory.h"

namespace longspan::trainer {

struct CheckpointWriterOptions {
  std::filesystem::path directory;  // the run's checkpoints/ folder, shared by all ranks
  RetentionPolicy retention;
  // Host memory for copies that wait for the disk, per rank. A save whose share is larger blocks
  // until the rest has been written.
  size_t staging_bytes = size_t{8} << 30;
  size_t max_record_bytes = size_t{64} << 20;  // payload of one record, at most 64 MiB

  // For tests that interrupt a save. 0: no limit.
  uint64_t write_bytes_per_second = 0;
  // Called when a stage has been reached; throwing makes the stage fail like a system error. Stages
  // of the background thread (hence concurrent with the others): "shard:created",
  // "shard:in_record" (before each payload), "shard:written", "shard:synced". Of the calling
  // thread: "prepared", "staged", and on rank 0 "manifest:written", "manifest:synced",
  // "moved_aside" (only for a step that existed), "renamed", "committed", "retired".
  std::function<void(const std::string& stage)> stage_hook;
};

// Saves checkpoints while training goes on.
//
//   every step:        writer.Poll();
//   every N steps:     writer.Save(info, tensors);      // returns after copying
//   before the end:    writer.Wait();
//
// Every rank passes the same list. Of a tensor that all hold (replicated) each writes its share:
// elements [64 * floor(units * rank / ranks), ...), units = ceil(elements / 64); of one that is
// split over ranks each writes its piece, or where several hold that, its share of the piece.
// Together the pieces must cover the tensor once. Files go to `step_N.tmp`, are synced, and become
// `step_N` by one rename after the manifest is in place, so an interruption at any moment leaves
// the earlier checkpoints and either none or all of the new one. A step that exists already stays
// readable until its successor is complete.
//
// Save, Poll and Wait are collective over `world` and throw on all ranks alike. The background
// thread does not communicate. Not thread-safe. Destroying a writer abandons a pending save; its
// .tmp folder is removed by the next save.
//
// Errors    CheckpointError: a NaN or infinity in a float tensor (names it), or a failed write
//           (names the file, the system's reason, and the checkpoint that stays). The .tmp folder
//           is removed, nothing else changes, and the writer can be used again.
//           InvalidArgument: no name, a name twice, or lists or steps that differ between ranks.
//           Pieces that do not fit together fail the save.
// Devices   all: tensors on a GPU are copied through pinned memory after the work that was issued
//           before; the file does not say where a tensor was
class CheckpointWriter {
 public:
  CheckpointWriter(CheckpointWriterOptions options, parallel::Communicator& world);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // Finishes an earlier save, then copies this rank's share; the tensors may change afterwards.
  // Does nothing when this writer's last commit has equal `info`.
  void Save(const CheckpointInfo& info, const std::vector<NamedTensor>& tensors);

  // Commits when all ranks have written their files. One all-reduce of one number while a save is
  // pending, nothing otherwise. True when this call committed a checkpoint.
  bool Poll();

  // Blocks until nothing is pending. True when this call committed a checkpoint.
  bool Wait();

  bool pending() const;

 private:
  struct PendingSave;
  void CheckArguments(const CheckpointInfo& info, const std::vector<NamedTensor>& tensors);
  bool IsRepetition(const CheckpointInfo& info);
  void Prepare(const std::filesystem::path& temporary);
  std::string Stage(const std::vector<NamedTensor>& tensors);
  void StageTensor(uint32_t index, const NamedTensor& named, std::string& not_finite);
  void GatherShards();
  void Commit();
  void WriteManifest();
  void MoveIntoPlace();
  void Retire();
  std::string RunAgreed(const std::function<void()>& action);
  [[noreturn]] void Abandon(const std::string& reason);
  void Hook(const char* stage) const;

  const CheckpointWriterOptions options_;
  parallel::Communicator& world_;
  std::unique_ptr<PendingSave> pending_;
  std::optional<CheckpointInfo> last_committed_;
  std::thread remover_;  // deletes retired checkpoints on rank 0
};

}  // namespace longspan::trainer
