#pragma once
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>

namespace longspan::data {

// "No such file or directory" for the current errno.
std::string SystemReason();

// A regular file opened for reading. Errors: DataError naming the file and the system's reason.
class InputFile {
 public:
  explicit InputFile(std::string path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  int64_t size() const { return size_; }  // when it was opened
  const std::string& path() const { return path_; }
  // Appends bytes [offset, offset + count) to `out`; fewer where the file ends. Returns the number.
  int64_t ReadAt(int64_t offset, int64_t count, std::string& out) const;

 private:
  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
};

// A whole file mapped read-only. Thread-safe; the bytes live as long as the object.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const uint8_t> bytes() const { return {data_, static_cast<size_t>(size_)}; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

// Removes a file that no living OutputFile has, such as one of a killed process. Whatever is wrong
// with it (a file system without locks included), it stays then and nothing is reported.
void RemoveIfAbandoned(const std::string& path);

// A new file for sequential writing through a large buffer. It is removed again when the object
// dies, unless it was renamed. All its life it holds a lock, which RemoveIfAbandoned looks for.
// Errors (a full disk among them): DataError naming the file.
class OutputFile {
 public:
  explicit OutputFile(std::string path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void Write(const void* bytes, int64_t count);
  // Overwrites or re-reads bytes that are already written; the write position stays at the end.
  void WriteAt(int64_t offset, const void* bytes, int64_t count);
  void ReadAt(int64_t offset, void* bytes, int64_t count);
  // Drops everything behind `size` bytes.
  void Truncate(int64_t size);
  // Flushes to the disk and closes: after this the file can only be renamed.
  void Close();
  void Rename(const std::string& path);

  int64_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  void Flush();
  [[noreturn]] void Fail(const char* verb) const;

  std::string path_;
  std::FILE* file_ = nullptr;
  int lock_fd_ = -1;  // keeps the lock behind Close
  int64_t size_ = 0;
  bool renamed_ = false;
};

}  // namespace longspan::data
