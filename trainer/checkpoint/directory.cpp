#include "trainer/checkpoint/directory.h"

#include <glog/logging.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <set>
#include <string_view>
#include <system_error>

#include "ops/core/error.h"
#include "trainer/checkpoint/format.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::trainer {
namespace {

constexpr const char* kReplaced = ".replaced";
constexpr const char* kDeleting = ".deleting";
constexpr const char* kSuperseded = ".superseded";
constexpr const char* kTemporary = ".tmp";

struct StepEntry {
  int64_t step;
  std::string suffix;  // "" or one of the above
  std::filesystem::path path;
};

// Takes "step_00001000.tmp" apart; nothing for names of another form.
std::optional<StepEntry> ParseEntry(const std::filesystem::path& path) {
  const std::string name = path.filename().string();
  constexpr std::string_view kPrefix = "step_";
  if (name.rfind(kPrefix, 0) != 0) return std::nullopt;
  const char* const end = name.data() + name.size();
  int64_t step = 0;
  const auto [rest, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  if (error != std::errc() || step < 0) return std::nullopt;
  const std::string suffix(rest, end);
  if (name != StepDirectoryName(step) + suffix) return std::nullopt;
  return StepEntry{step, suffix, path};
}

// All entries of the folder that belong to checkpoints, newest step first; empty when the folder
// does not exist.
std::vector<StepEntry> ListEntries(const std::filesystem::path& directory) {
  std::vector<StepEntry> entries;
  std::error_code error;
  std::filesystem::directory_iterator it(directory, error);
  if (error == std::errc::no_such_file_or_directory) return entries;
  for (; !error && it != std::filesystem::directory_iterator(); it.increment(error)) {
    if (auto entry = ParseEntry(it->path())) entries.push_back(std::move(*entry));
  }
  if (error) {
    throw CheckpointError(
        Str("cannot list checkpoints in ", directory.string(), ": ", error.message()));
  }
  // For equal steps the plain name comes before ".replaced".
  std::sort(entries.begin(), entries.end(), [](const StepEntry& a, const StepEntry& b) {
    return a.step != b.step ? a.step > b.step : a.suffix < b.suffix;
  });
  return entries;
}

bool MayBeRead(const StepEntry& entry) { return entry.suffix.empty() || entry.suffix == kReplaced; }

std::filesystem::path WithSuffix(std::filesystem::path path, const std::string& suffix) {
  path += suffix;
  return path;
}

}  // namespace

std::string StepDirectoryName(int64_t step) {
  char name[32];
  std::snprintf(name, sizeof name, "step_%08lld", static_cast<long long>(step));
  return name;
}

std::string WhyNotCommitted(const std::filesystem::path& checkpoint) {
  try {
    CheckFiles(checkpoint, ReadManifest(checkpoint));
    return "";
  } catch (const CheckpointError& error) {
    return error.what();
  }
}

std::optional<std::filesystem::path> FindLatest(const std::filesystem::path& directory,
                                                std::vector<std::string>* skipped) {
  std::vector<std::string> reasons;
  for (const StepEntry& entry : ListEntries(directory)) {
    if (!MayBeRead(entry)) continue;
    const std::string reason = WhyNotCommitted(entry.path);
    if (reason.empty()) {
      if (skipped != nullptr) *skipped = std::move(reasons);
      return entry.path;
    }
    reasons.push_back(reason);
  }
  if (!reasons.empty()) {
    throw CheckpointError(Str("none of the ", reasons.size(), " checkpoints in ",
                              directory.string(), " can be used (the newest: ", reasons.front(),
                              "); move them away to start over"));
  }
  return std::nullopt;
}

std::filesystem::path ResolveCheckpoint(const std::filesystem::path& path) {
  std::error_code ignored;
  if (std::filesystem::exists(path / kManifestName, ignored)) return path;
  for (const auto& folder : {path / "checkpoints", path}) {
    if (const auto latest = FindLatest(folder)) return *latest;
  }
  std::string known;
  for (const auto& folder : {path.parent_path(), path / "checkpoints"}) {
    if (folder.empty() || !std::filesystem::is_directory(folder, ignored)) continue;
    for (const StepEntry& entry : ListEntries(folder)) {
      if (entry.suffix.empty()) known += Str(known.empty() ? "" : ", ", entry.path.string());
    }
  }
  throw CheckpointError(Str("there is no checkpoint at ", path.string(),
                            known.empty() ? "; give a run directory or one of its checkpoints"
                                          : "; these exist: " + known));
}

void CleanLeftovers(const std::filesystem::path& directory) {
  for (const StepEntry& entry : ListEntries(directory)) {
    if (entry.suffix == kTemporary || entry.suffix == kDeleting) {
      RemoveTree(entry.path);
    } else if (entry.suffix == kReplaced) {
      const auto plain = directory / StepDirectoryName(entry.step);
      std::error_code ignored;
      if (!std::filesystem::exists(plain, ignored)) {
        Rename(entry.path, plain);
      } else if (WhyNotCommitted(plain).empty()) {
        RemoveTree(entry.path);
      }
    }
  }
}

std::vector<std::filesystem::path> SetAsideNewerThan(const std::filesystem::path& directory,
                                                     int64_t step) {
  std::vector<std::filesystem::path> moved;
  for (const StepEntry& entry : ListEntries(directory)) {
    if (entry.step <= step || !MayBeRead(entry)) continue;
    auto target = WithSuffix(directory / StepDirectoryName(entry.step), kSuperseded);
    std::error_code ignored;
    for (int n = 2; std::filesystem::exists(target, ignored); ++n) {
      target = WithSuffix(directory / StepDirectoryName(entry.step), Str(kSuperseded, ".", n));
    }
    Rename(entry.path, target);
    moved.push_back(target);
  }
  if (!moved.empty()) SyncDirectory(directory);
  return moved;
}

std::vector<std::filesystem::path> RetireCheckpoints(const std::filesystem::path& directory,
                                                     int64_t newest,
                                                     const RetentionPolicy& policy) {
  std::vector<std::filesystem::path> retired;
  int kept = 0;
  for (const StepEntry& entry : ListEntries(directory)) {
    if (!entry.suffix.empty() || entry.step > newest) continue;
    if (!WhyNotCommitted(entry.path).empty()) continue;
    const bool for_ever = policy.keep_every > 0 && entry.step % policy.keep_every == 0;
    if (entry.step == newest || kept < policy.keep_last || for_ever) {
      ++kept;
      continue;
    }
    const auto target = WithSuffix(entry.path, kDeleting);
    try {
      Rename(entry.path, target);
      retired.push_back(target);
    } catch (const CheckpointError& error) {
      LOG(WARNING) << "an old checkpoint stays: " << error.what();
    }
  }
  return retired;
}

void RemoveTree(const std::filesystem::path& path) noexcept {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) LOG(WARNING) << "cannot remove " << path.string() << ": " << error.message();
}

}  // namespace longspan::trainer
