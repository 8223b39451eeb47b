#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace longspan::trainer {

class FileWriter;

// One record to write: a copy of elements [begin, end) of a tensor.
struct ShardPiece {
  uint32_t tensor = 0;  // index into the save's tensor list
  int64_t begin = 0, end = 0;
  std::string frame;  // format.h, RecordFrame
  std::unique_ptr<std::byte[]> payload;
  size_t payload_bytes = 0;
};

// Where a record went, for the manifest.
struct WrittenPiece {
  uint32_t tensor = 0;
  int64_t begin = 0, end = 0;
  uint64_t frame_offset = 0, frame_xxh3 = 0;
  uint64_t offset = 0, xxh3 = 0;
};
static_assert(std::is_trivially_copyable_v<WrittenPiece>, "sent between ranks as bytes");

struct ShardWriterOptions {
  size_t staging_bytes = 0;                            // copies that may wait for the disk
  uint64_t bytes_per_second = 0;                       // 0: as fast as the disk takes them
  std::function<void(const std::string& stage)> hook;  // see CheckpointWriterOptions
};

// One rank's shard file, written by a thread of its own from a queue of bounded size. The methods
// are called from one other thread. Nothing here throws for a failed write: Join reports it.
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path file, ShardWriterOptions options);
  ~ShardWriter();  // cancels what is not written yet
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  // Blocks while the queue holds more than staging_bytes. Drops the piece after a failure.
  void Push(ShardPiece piece);
  void Finish();  // no more pieces will come
  void Cancel();  // stop soon, whatever is left

  // kFailed from the first error on, while the thread may still be ending.
  enum class Status { kRunning, kDone, kFailed };
  Status status() const;
  // Waits for the thread; returns its error, empty when the file is written and synced.
  std::string Join();

  // After a successful Join.
  const std::vector<WrittenPiece>& pieces() const { return pieces_; }
  uint64_t file_bytes() const { return file_bytes_; }

 private:
  void Run();
  void WriteFile();
  void WritePiece(FileWriter& file, const ShardPiece& piece);
  void WriteThrottled(FileWriter& file, const std::byte* data, size_t bytes);
  bool Pop(ShardPiece& piece);
  void Hook(const char* stage) const;

  const std::filesystem::path path_;
  const ShardWriterOptions options_;
  std::vector<WrittenPiece> pieces_;
  uint64_t file_bytes_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<ShardPiece> queue_;
  size_t queued_bytes_ = 0;
  bool finished_ = false, cancelled_ = false;
  Status status_ = Status::kRunning;
  std::string error_;
  std::thread thread_;  // last: starts when all other members are ready
};

}  // namespace longspan::trainer
