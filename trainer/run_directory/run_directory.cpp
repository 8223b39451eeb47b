#include "trainer/run_directory/run_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <thread>

#include "ops/core/check.h"
#include "ops/core/error.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::trainer {
namespace {

constexpr auto kRetryInterval = std::chrono::milliseconds(100);

// What the holder wrote: "process 4711 on host node3".
std::string Holder(int descriptor) {
  char text[512];
  const ssize_t got = ::pread(descriptor, text, sizeof text, 0);
  std::string holder(text, got > 0 ? static_cast<size_t>(got) : 0);
  if (const size_t end = holder.find('\n'); end != std::string::npos) holder.resize(end);
  return holder.empty() ? "a process that has not given its name" : holder;
}

[[noreturn]] void FailUnwritable(const std::filesystem::path& path, const std::string& reason) {
  throw CheckpointError(Str("run directory ", path.string(), " cannot be written: ", reason,
                            "; choose another one or change its permissions"));
}

}  // namespace

RunLock::RunLock(const std::filesystem::path& file, std::chrono::milliseconds wait) {
  descriptor_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) FailUnwritable(file.parent_path(), ErrnoText(errno));
  const auto deadline = std::chrono::steady_clock::now() + wait;
  while (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    const int error_number = errno;
    const auto left = deadline - std::chrono::steady_clock::now();
    if (error_number == EWOULDBLOCK && left > left.zero()) {
      std::this_thread::sleep_for(
          std::min<std::chrono::steady_clock::duration>(left, kRetryInterval));
      continue;
    }
    if (error_number == EINTR) continue;
    const std::string holder = Holder(descriptor_);
    ::close(descriptor_);
    if (error_number != EWOULDBLOCK) {
      throw CheckpointError(Str("cannot lock ", file.string(), ": ", ErrnoText(error_number)));
    }
    throw RunDirectoryInUse(Str("run directory ", file.parent_path().string(), " is in use by ",
                                holder, "; stop that job or choose another run directory"));
  }
  const std::string text = Str("process ", ::getpid(), " on host ", HostName(), "\n");
  if (::ftruncate(descriptor_, 0) != 0 ||
      ::pwrite(descriptor_, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
    const int error_number = errno;
    ::close(descriptor_);
    FailUnwritable(file.parent_path(), ErrnoText(error_number));
  }
}

// The file itself stays: removing it would race with a waiting job that has it open.
RunLock::~RunLock() { ::close(descriptor_); }

void RunDirectory::Claim(std::chrono::milliseconds wait) {
  if (claimed()) return;
  try {
    CreateDirectories(path_);
  } catch (const CheckpointError& error) {
    throw CheckpointError(Str(error.what(), "; choose another run directory"));
  }
  auto lock = std::make_unique<RunLock>(lock_file(), wait);
  for (const auto& directory : {checkpoints(), log(), plots()}) CreateDirectories(directory);
  lock_ = std::move(lock);
}

void RunDirectory::WriteConfig(const std::string& text) const {
  LONGSPAN_CHECK(claimed()) << "RunDirectory::WriteConfig before Claim";
  WriteFileAtomically(config_file(), text);
}

}  // namespace longspan::trainer
