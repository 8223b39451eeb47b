#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "ops/core/context.h"
#include "parallel/comm/communicator.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/writer.h"

namespace longspan::test {

// A new directory that goes with the object.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Tensors of every dtype with awkward sizes: empty, scalar, below, at and above the 64 elements
// that shares are aligned to. `version` changes every value.
std::vector<trainer::NamedTensor> MixedTensors(Context& ctx, uint64_t version);
// The same names and shapes, filled with another value.
std::vector<trainer::NamedTensor> BlankTensors(Context& ctx);
// Empty when all bytes agree, else the name of the first tensor that differs.
std::string FirstDifference(const std::vector<trainer::NamedTensor>& a,
                            const std::vector<trainer::NamedTensor>& b);

trainer::CheckpointInfo SampleInfo(int64_t step, uint64_t version = 1);

// Saves MixedTensors(version) from `ranks` local ranks and waits for the commit.
void SaveMixed(const std::filesystem::path& directory, int ranks, int64_t step, uint64_t version,
               trainer::CheckpointWriterOptions options = {});

// Names in a directory.
std::set<std::string> Names(const std::filesystem::path& directory);

// The text of the error of type E that `action` throws; fails the test when it throws none.
template <class E>
std::string ErrorOf(const std::function<void()>& action) {
  try {
    action();
  } catch (const E& error) {
    return error.what();
  }
  return "(nothing was thrown)";
}

// Runs `action` in a child process and returns its exit code, or minus the signal that ended it.
int RunInChild(const std::function<void()>& action);

}  // namespace longspan::test
