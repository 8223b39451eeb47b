#include "trainer/resume.h"

#include <algorithm>

#include "trainer/checkpoint/directory.h"
#include "trainer/checkpoint/reader.h"

namespace longspan::trainer {

std::optional<std::filesystem::path> DecideResume(const RunDirectory& directory,
                                                  const std::string& resume,
                                                  std::vector<std::string>* notes) {
  const std::filesystem::path checkpoints = directory.checkpoints();
  if (resume == "auto") return FindLatest(checkpoints, notes);
  if (resume == "never") {
    const auto latest = FindLatest(checkpoints, notes);
    if (latest.has_value()) {
      throw CheckpointError(Str("--resume never: ", directory.path().string(), " already holds ",
                                latest->filename().string(),
                                "; use --resume auto to continue it, or another --run-dir"));
    }
    return std::nullopt;
  }
  const bool number = !resume.empty() && std::all_of(resume.begin(), resume.end(), [](char c) {
    return c >= '0' && c <= '9';
  }) && resume.size() < 18;
  const std::filesystem::path path =
      number ? checkpoints / StepDirectoryName(std::stoll(resume)) : std::filesystem::path(resume);
  const std::filesystem::path resolved = ResolveCheckpoint(path);
  const std::string why = WhyNotCommitted(resolved);
  if (!why.empty())
    throw CheckpointError("--resume " + resume + ": " + why + "; use another checkpoint");
  return resolved;
}

}  // namespace longspan::trainer
