#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <mutex>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/trainer/checkpoint/support.h"
#include "trainer/checkpoint/reader.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::RunLocal;
using trainer::CheckpointReader;
using trainer::CheckpointWriter;
using trainer::CheckpointWriterOptions;
using trainer::NamedTensor;

constexpr int kRanks = 2;
constexpr int kKilled = 42;
// Old weights are version 1, those of the interrupted save version 2.
constexpr uint64_t kOld = 1, kSaved = 2;

// Version of the tensors in the newest checkpoint, after checking that they are exactly those.
uint64_t LatestVersion(const std::filesystem::path& directory, int64_t* step) {
  const auto latest = trainer::FindLatest(directory);
  if (!latest) return 0;
  const CheckpointReader reader = CheckpointReader::Open(*latest);
  const uint64_t version = std::stoull(reader.info().extra.at("version"));
  *step = reader.info().step;
  Context ctx({.threads = 1});
  std::vector<NamedTensor> loaded = BlankTensors(ctx);
  reader.Load(loaded);
  EXPECT_EQ(FirstDifference(loaded, MixedTensors(ctx, version)), "");
  return version;
}

// Order in which one save passes its stages; a stage's first occurrence counts.
std::vector<std::string> Stages(int64_t step, int64_t old_step) {
  TemporaryDirectory directory;
  SaveMixed(directory.path(), kRanks, old_step, kOld);
  std::mutex mutex;
  std::vector<std::string> stages;
  SaveMixed(directory.path(), kRanks, step, kSaved, {.stage_hook = [&](const std::string& stage) {
              const std::lock_guard lock(mutex);
              if (std::find(stages.begin(), stages.end(), stage) == stages.end()) {
                stages.push_back(stage);
              }
            }});
  return stages;
}

bool IsAfterRename(const std::string& stage) {
  return stage == "renamed" || stage == "committed" || stage == "retired";
}

void ExpectClean(const std::filesystem::path& directory) {
  for (const std::string& name : Names(directory)) {
    EXPECT_EQ(name.find('.'), std::string::npos) << name << " is left over";
  }
}

struct Scenario {
  const char* name;
  int64_t old_step, step;
};
class InterruptionTest : public testing::TestWithParam<Scenario> {};

TEST_P(InterruptionTest, AKillAtEachStageLeavesACompleteCheckpoint) {
  const auto [name, old_step, step] = GetParam();
  const std::vector<std::string> stages = Stages(step, old_step);
  ASSERT_GE(stages.size(), 11u);
  for (const std::string& stage : stages) {
    SCOPED_TRACE(stage);
    TemporaryDirectory directory;
    SaveMixed(directory.path(), kRanks, old_step, kOld);
    const int code = RunInChild([&] {
      SaveMixed(directory.path(), kRanks, step, kSaved, {.stage_hook = [&](const std::string& at) {
                  if (at == stage) ::_exit(kKilled);
                }});
    });
    ASSERT_EQ(code, kKilled);
    int64_t latest_step = -1;
    const uint64_t version = LatestVersion(directory.path(), &latest_step);
    EXPECT_EQ(version, IsAfterRename(stage) ? kSaved : kOld);
    EXPECT_EQ(latest_step, IsAfterRename(stage) ? step : old_step);
    // The next job saves the same step again and clears up.
    SaveMixed(directory.path(), kRanks, step, kSaved + 1);
    EXPECT_EQ(LatestVersion(directory.path(), &latest_step), kSaved + 1);
    EXPECT_EQ(latest_step, step);
    ExpectClean(directory.path());
  }
}

TEST_P(InterruptionTest, AFailureAtEachStageIsReportedOnAllRanks) {
  const auto [name, old_step, step] = GetParam();
  for (const std::string& stage : Stages(step, old_step)) {
    for (int failing = 0; failing < kRanks; ++failing) {
      const bool on_rank0_only =
          stage.starts_with("manifest") || stage == "moved_aside" || IsAfterRename(stage);
      if (failing > 0 && on_rank0_only) continue;
      SCOPED_TRACE(Str(stage, " on rank ", failing));
      TemporaryDirectory directory;
      SaveMixed(directory.path(), kRanks, old_step, kOld);
      RunLocal(kRanks, [&](Communicator& world) {
        Context ctx({.threads = 1});
        CheckpointWriterOptions options{.directory = directory.path()};
        options.stage_hook = [&, rank = world.rank()](const std::string& at) {
          if (rank == failing && at == stage) throw CheckpointError("failure of the test");
        };
        CheckpointWriter writer(options, world);
        const std::string error = ErrorOf<CheckpointError>([&] {
          writer.Save(SampleInfo(step, kSaved), MixedTensors(ctx, kSaved));
          writer.Wait();
        });
        if (stage == "retired") {
          // Too late to matter: the new checkpoint is in place, old ones only stay longer.
          EXPECT_EQ(error, "(nothing was thrown)");
        } else {
          EXPECT_NE(error.find("failure of the test"), std::string::npos) << error;
          EXPECT_NE(error.find("the newest complete checkpoint is"), std::string::npos) << error;
        }
        EXPECT_FALSE(writer.pending());
      });
      ExpectClean(directory.path());
      int64_t latest_step = -1;
      EXPECT_EQ(LatestVersion(directory.path(), &latest_step),
                IsAfterRename(stage) ? kSaved : kOld);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Scenarios, InterruptionTest,
                         testing::Values(Scenario{"NewStep", 1, 2}, Scenario{"SameStep", 2, 2}),
                         [](const auto& info) { return info.param.name; });

// A write that the system refuses, with the limit on file sizes standing in for a full disk.
TEST(FailedWriteTest, NamesFileReasonAndTheCheckpointThatStays) {
  TemporaryDirectory directory;
  SaveMixed(directory.path(), 1, 100, kOld);
  const auto message_file = directory.path() / "message";
  const int code = RunInChild([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{65536, 65536};
    LONGSPAN_CHECK(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    parallel::SelfCommunicator world;
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path()}, world);
    const std::string error = ErrorOf<CheckpointError>([&] {
      writer.Save(SampleInfo(200), {{"w", ctx.Zeros({100000}, DType::kF32)}});
      writer.Wait();
    });
    std::ofstream(message_file) << error;
    // With less to write the same writer works.
    writer.Save(SampleInfo(300), {{"w", ctx.Zeros({100}, DType::kF32)}});
    LONGSPAN_CHECK(writer.Wait());
  });
  ASSERT_EQ(code, 0);
  const std::string error = trainer::ReadFile(message_file);
  EXPECT_NE(error.find("saving checkpoint step_00000200 failed"), std::string::npos) << error;
  EXPECT_NE(error.find("step_00000200.tmp/shard_00000.binpb: File too large"), std::string::npos)
      << error;
  EXPECT_NE(error.find((directory.path() / "step_00000100").string()), std::string::npos) << error;
  EXPECT_EQ(Names(directory.path()),
            (std::set<std::string>{"message", "step_00000100", "step_00000300"}));
}

TEST(FailedWriteTest, ADirectoryThatCannotBeMadeIsReported) {
  TemporaryDirectory directory;
  std::ofstream(directory.path() / "file") << "in the way";
  RunLocal(kRanks, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path() / "file" / "checkpoints"}, world);
    const std::string error =
        ErrorOf<CheckpointError>([&] { writer.Save(SampleInfo(1), MixedTensors(ctx, 1)); });
    EXPECT_NE(error.find("cannot create directory"), std::string::npos) << error;
    EXPECT_NE(error.find("Not a directory"), std::string::npos) << error;
  });
}

TEST(FailedWriteTest, ADestroyedWriterLeavesNoCheckpoint) {
  TemporaryDirectory directory;
  const auto start = std::chrono::steady_clock::now();
  RunLocal(kRanks, [&](Communicator& world) {
    Context ctx({.threads = 1});
    CheckpointWriter writer({.directory = directory.path(), .write_bytes_per_second = 100}, world);
    writer.Save(SampleInfo(1), MixedTensors(ctx, 1));
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_LT(took.count(), 5) << "28 s of throttled writing should have been cut short";
  EXPECT_FALSE(trainer::FindLatest(directory.path()).has_value());
  EXPECT_EQ(Names(directory.path()), std::set<std::string>{"step_00000001.tmp"});
}

}  // namespace
}  // namespace longspan::test
