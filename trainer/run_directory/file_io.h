#pragma once
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace longspan::trainer {

// Files of a run that must not be lost or half written. All errors are CheckpointError with the
// path and the system's reason ("cannot write /run/x: No space left on device").

// Writes one file. Not thread-safe.
class FileWriter {
 public:
  enum class Mode {
    kCreate,    // a new file; an error when it exists
    kTruncate,  // replaces what is there
    kAppend,    // continues at the end, creates when missing
  };
  FileWriter(std::filesystem::path path, Mode mode);
  ~FileWriter();  // closes; errors go to the log only, so call Close() where they matter
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  void Write(const void* data, size_t bytes);
  void Write(std::string_view text) { Write(text.data(), text.size()); }
  void Sync();   // returns when the device has the bytes
  void Close();  // reports errors that some file systems deliver only here
  const std::filesystem::path& path() const { return path_; }

 private:
  [[noreturn]] void Fail(const char* verb, int error_number) const;
  std::filesystem::path path_;
  int descriptor_ = -1;
};

// Makes names that were created, renamed or removed in `directory` survive a power failure.
void SyncDirectory(const std::filesystem::path& directory);

// Makes what is missing of the path, durably.
void CreateDirectories(const std::filesystem::path& directory);
void Rename(const std::filesystem::path& from, const std::filesystem::path& to);

// Readers see the old content or the new one, never a part: temporary sibling, fsync, rename.
void WriteFileAtomically(const std::filesystem::path& path, std::string_view content);

std::string ReadFile(const std::filesystem::path& path);

// The reason of an errno value as text: "No space left on device".
std::string ErrnoText(int error_number);

// This machine's name, for lock files and event files.
std::string HostName();

}  // namespace longspan::trainer
