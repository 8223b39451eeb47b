#include "trainer/checkpoint/shard_writer.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <string_view>

#include "ops/core/error.h"
#include "trainer/checkpoint/format.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::trainer {
namespace {

// Thrown through the thread's own stack when it is told to stop.
struct Cancelled {};

using Clock = std::chrono::steady_clock;

// Rank 0 has made the directory, but another machine's view of a network file system may lag.
constexpr auto kVisibilityWait = std::chrono::seconds(5);

void AwaitDirectory(const std::filesystem::path& directory) {
  const auto deadline = Clock::now() + kVisibilityWait;
  std::error_code ignored;
  while (!std::filesystem::is_directory(directory, ignored) && Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

}  // namespace

ShardWriter::ShardWriter(std::filesystem::path file, ShardWriterOptions options)
    : path_(std::move(file)), options_(std::move(options)), thread_([this] { Run(); }) {}

ShardWriter::~ShardWriter() {
  Cancel();
  Join();
}

void ShardWriter::Push(ShardPiece piece) {
  std::unique_lock lock(mutex_);
  // A piece larger than the limit passes alone.
  changed_.wait(lock, [&] {
    return queued_bytes_ == 0 || queued_bytes_ + piece.payload_bytes <= options_.staging_bytes ||
           status_ == Status::kFailed;
  });
  if (status_ == Status::kFailed) return;
  queued_bytes_ += piece.payload_bytes;
  queue_.push_back(std::move(piece));
  changed_.notify_all();
}

void ShardWriter::Finish() {
  const std::lock_guard lock(mutex_);
  finished_ = true;
  changed_.notify_all();
}

void ShardWriter::Cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

ShardWriter::Status ShardWriter::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

std::string ShardWriter::Join() {
  if (thread_.joinable()) thread_.join();
  return error_;
}

void ShardWriter::Run() {
  std::string error;
  try {
    WriteFile();
  } catch (const Cancelled&) {
    error = Str("writing ", path_.string(), " was cancelled");
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  const std::lock_guard lock(mutex_);
  status_ = error.empty() ? Status::kDone : Status::kFailed;
  error_ = std::move(error);
  queue_.clear();
  changed_.notify_all();
}

void ShardWriter::WriteFile() {
  AwaitDirectory(path_.parent_path());
  FileWriter file(path_, FileWriter::Mode::kCreate);
  Hook("shard:created");
  ShardPiece piece;
  while (Pop(piece)) {
    WritePiece(file, piece);
    const std::lock_guard lock(mutex_);
    queued_bytes_ -= piece.payload_bytes;
    piece.payload.reset();
    changed_.notify_all();
  }
  Hook("shard:written");
  file.Sync();
  file.Close();
  Hook("shard:synced");
}

void ShardWriter::WritePiece(FileWriter& file, const ShardPiece& piece) {
  WrittenPiece written{piece.tensor, piece.begin, piece.end, file_bytes_, Xxh3(piece.frame), 0, 0};
  WriteThrottled(file, reinterpret_cast<const std::byte*>(piece.frame.data()), piece.frame.size());
  Hook("shard:in_record");
  written.offset = file_bytes_;
  written.xxh3 = Xxh3({reinterpret_cast<const char*>(piece.payload.get()), piece.payload_bytes});
  WriteThrottled(file, piece.payload.get(), piece.payload_bytes);
  pieces_.push_back(written);
}

void ShardWriter::WriteThrottled(FileWriter& file, const std::byte* data, size_t bytes) {
  // Small enough that a cancelled or throttled writer reacts at once.
  const size_t chunk =
      options_.bytes_per_second == 0
          ? size_t{8} << 20
          : static_cast<size_t>(std::max<uint64_t>(options_.bytes_per_second / 50, 1));
  while (bytes > 0) {
    const size_t part = std::min(bytes, chunk);
    file.Write(data, part);
    data += part;
    bytes -= part;
    file_bytes_ += part;
    std::unique_lock lock(mutex_);
    if (options_.bytes_per_second > 0) {
      const std::chrono::duration<double> pause(static_cast<double>(part) /
                                                static_cast<double>(options_.bytes_per_second));
      changed_.wait_until(lock, Clock::now() + std::chrono::duration_cast<Clock::duration>(pause),
                          [&] { return cancelled_; });
    }
    if (cancelled_) throw Cancelled();
  }
}

bool ShardWriter::Pop(ShardPiece& piece) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !queue_.empty() || finished_ || cancelled_; });
  if (cancelled_) throw Cancelled();
  if (queue_.empty()) return false;
  piece = std::move(queue_.front());
  queue_.pop_front();
  return true;
}

void ShardWriter::Hook(const char* stage) const {
  if (options_.hook) options_.hook(stage);
}

}  // namespace longspan::trainer
