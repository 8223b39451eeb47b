#include "data/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "ops/core/error.h"

namespace longspan::data {
namespace {

constexpr size_t kBufferBytes = 1 << 20;

// Opens a regular file and reports its size; DataError otherwise.
int OpenForReading(const std::string& path, int64_t* size) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw DataError(Str("cannot open ", path, ": ", SystemReason()));
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    const std::string reason = S_ISREG(info.st_mode) ? SystemReason() : "it is not a regular file";
    ::close(fd);
    throw DataError(Str("cannot read ", path, ": ", reason));
  }
  *size = info.st_size;
  return fd;
}

}  // namespace

std::string SystemReason() { return std::generic_category().message(errno); }

InputFile::InputFile(std::string path) : path_(std::move(path)) {
  fd_ = OpenForReading(path_, &size_);
}

InputFile::~InputFile() { ::close(fd_); }

int64_t InputFile::ReadAt(int64_t offset, int64_t count, std::string& out) const {
  const size_t base = out.size();
  out.resize(base + static_cast<size_t>(count));
  int64_t done = 0;
  while (done < count) {
    const ssize_t n =
        ::pread(fd_, out.data() + base + done, static_cast<size_t>(count - done), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw DataError(Str("cannot read ", path_, ": ", SystemReason()));
    if (n == 0) break;
    done += n;
  }
  out.resize(base + static_cast<size_t>(done));
  return done;
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = OpenForReading(path, &size_);
  if (size_ > 0) {
    void* mapped = ::mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
      const std::string reason = SystemReason();
      ::close(fd);
      throw DataError(Str("cannot map ", path, ": ", reason));
    }
    data_ = static_cast<const uint8_t*>(mapped);
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_));
}

void RemoveIfAbandoned(const std::string& path) {
  // For writing, because NFS gives an exclusive lock on nothing less.
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return;
  if (::flock(fd, LOCK_EX | LOCK_NB) == 0) ::unlink(path.c_str());
  ::close(fd);
}

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  struct stat info {};
  int fd = -1;
  do {  // again if it was taken for abandoned before it was locked
    if (fd >= 0) ::close(fd);
    // O_EXCL: never someone else's file
    fd = ::open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) throw DataError(Str("cannot create ", path_, ": ", SystemReason()));
    ::flock(fd, LOCK_EX);  // without locks nobody takes anything for abandoned
  } while (::fstat(fd, &info) == 0 && info.st_nlink == 0);
  lock_fd_ = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  file_ = lock_fd_ < 0 ? nullptr : ::fdopen(fd, "w+b");
  if (file_ == nullptr) {
    const std::string reason = SystemReason();
    ::unlink(path_.c_str());
    ::close(fd);
    if (lock_fd_ >= 0) ::close(lock_fd_);
    throw DataError(Str("cannot create ", path_, ": ", reason));
  }
  std::setvbuf(file_, nullptr, _IOFBF, kBufferBytes);
}

OutputFile::~OutputFile() {
  if (file_ != nullptr) std::fclose(file_);
  if (!renamed_) ::unlink(path_.c_str());
  ::close(lock_fd_);
}

void OutputFile::Fail(const char* verb) const {
  throw DataError(Str("cannot ", verb, " ", path_, ": ", SystemReason()));
}

void OutputFile::Write(const void* bytes, int64_t count) {
  const auto n = static_cast<size_t>(count);
  if (n > 0 && std::fwrite(bytes, 1, n, file_) != n) Fail("write");
  size_ += count;
}

void OutputFile::Flush() {
  if (std::fflush(file_) != 0) Fail("write");
}

void OutputFile::WriteAt(int64_t offset, const void* bytes, int64_t count) {
  Flush();
  if (::pwrite(fileno(file_), bytes, static_cast<size_t>(count), offset) != count) Fail("write");
}

void OutputFile::ReadAt(int64_t offset, void* bytes, int64_t count) {
  Flush();
  if (::pread(fileno(file_), bytes, static_cast<size_t>(count), offset) != count) Fail("read back");
}

void OutputFile::Truncate(int64_t size) {
  Flush();
  if (::ftruncate(fileno(file_), size) != 0 || ::fseeko(file_, size, SEEK_SET) != 0) Fail("write");
  size_ = size;
}

void OutputFile::Close() {
  Flush();
  if (::fsync(fileno(file_)) != 0) Fail("write");
  std::FILE* file = std::exchange(file_, nullptr);
  if (std::fclose(file) != 0) Fail("write");
}

void OutputFile::Rename(const std::string& path) {
  if (std::rename(path_.c_str(), path.c_str()) != 0) {
    throw DataError(Str("cannot rename ", path_, " to ", path, ": ", SystemReason()));
  }
  renamed_ = true;
}

}  // namespace longspan::data
