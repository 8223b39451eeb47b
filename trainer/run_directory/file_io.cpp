#include "trainer/run_directory/file_io.h"

#include <fcntl.h>
#include <glog/logging.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>
#include <vector>

#include "ops/core/error.h"

namespace longspan::trainer {
namespace {

int OpenRetrying(const std::filesystem::path& path, int flags) {
  int descriptor;
  do {
    descriptor = ::open(path.c_str(), flags | O_CLOEXEC, 0644);
  } while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

[[noreturn]] void Fail(const char* verb, const std::filesystem::path& path, int error_number) {
  throw CheckpointError(Str("cannot ", verb, " ", path.string(), ": ", ErrnoText(error_number)));
}

}  // namespace

std::string ErrnoText(int error_number) { return std::generic_category().message(error_number); }

std::string HostName() {
  std::array<char, 256> name{};
  if (::gethostname(name.data(), name.size() - 1) != 0) return "unknown-host";
  return name.data();
}

FileWriter::FileWriter(std::filesystem::path path, Mode mode) : path_(std::move(path)) {
  const int flags = mode == Mode::kCreate     ? O_CREAT | O_EXCL
                    : mode == Mode::kTruncate ? O_CREAT | O_TRUNC
                                              : O_CREAT | O_APPEND;
  descriptor_ = OpenRetrying(path_, O_WRONLY | flags);
  if (descriptor_ < 0) Fail("create", errno);
}

FileWriter::~FileWriter() {
  if (descriptor_ >= 0 && ::close(descriptor_) != 0) {
    LOG(WARNING) << "cannot close " << path_.string() << ": " << ErrnoText(errno);
  }
}

void FileWriter::Write(const void* data, size_t bytes) {
  // Linux moves at most 2 GiB in one call.
  constexpr size_t kMaxCall = size_t{1} << 30;
  const auto* next = static_cast<const std::byte*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(descriptor_, next, std::min(bytes, kMaxCall));
    if (written < 0) {
      if (errno == EINTR) continue;
      Fail("write", errno);
    }
    next += written;
    bytes -= static_cast<size_t>(written);
  }
}

void FileWriter::Sync() {
  if (::fsync(descriptor_) != 0) Fail("write", errno);
}

void FileWriter::Close() {
  const int descriptor = std::exchange(descriptor_, -1);
  if (descriptor >= 0 && ::close(descriptor) != 0) Fail("write", errno);
}

void FileWriter::Fail(const char* verb, int error_number) const {
  trainer::Fail(verb, path_, error_number);
}

void SyncDirectory(const std::filesystem::path& directory) {
  const int descriptor = OpenRetrying(directory, O_RDONLY | O_DIRECTORY);
  if (descriptor < 0) Fail("open directory", directory, errno);
  const int error_number = ::fsync(descriptor) == 0 ? 0 : errno;
  ::close(descriptor);
  // Some network file systems keep names durable by themselves and refuse fsync on a directory.
  if (error_number != 0 && error_number != EINVAL) Fail("write", directory, error_number);
}

void CreateDirectories(const std::filesystem::path& directory) {
  std::error_code error;
  std::vector<std::filesystem::path> parents;  // of the directories that are missing
  for (auto path = std::filesystem::absolute(directory).lexically_normal();
       !std::filesystem::exists(path, error) && path.has_relative_path();
       path = path.parent_path()) {
    parents.push_back(path.parent_path());
  }
  std::filesystem::create_directories(directory, error);
  if (error) Fail("create directory", directory, error.value());
  for (const auto& parent : parents) SyncDirectory(parent);
}

void Rename(const std::filesystem::path& from, const std::filesystem::path& to) {
  std::error_code error;
  std::filesystem::rename(from, to, error);
  if (error) {
    throw CheckpointError(
        Str("cannot rename ", from.string(), " to ", to.string(), ": ", error.message()));
  }
}

void WriteFileAtomically(const std::filesystem::path& path, std::string_view content) {
  std::filesystem::path temporary = path;
  temporary += ".tmp";
  FileWriter writer(temporary, FileWriter::Mode::kTruncate);
  writer.Write(content);
  writer.Sync();
  writer.Close();
  Rename(temporary, path);
  SyncDirectory(path.has_parent_path() ? path.parent_path() : ".");
}

std::string ReadFile(const std::filesystem::path& path) {
  const int descriptor = OpenRetrying(path, O_RDONLY);
  if (descriptor < 0) Fail("open", path, errno);
  std::string content;
  std::array<char, 65536> buffer;
  for (;;) {
    const ssize_t got = ::read(descriptor, buffer.data(), buffer.size());
    if (got > 0) {
      content.append(buffer.data(), static_cast<size_t>(got));
    } else if (got == 0 || errno != EINTR) {
      const int error_number = errno;
      ::close(descriptor);
      if (got < 0) Fail("read", path, error_number);
      return content;
    }
  }
}

}  // namespace longspan::trainer
