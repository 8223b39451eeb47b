#include "trainer/checkpoint/directory.h"

#include <gtest/gtest.h>

#include <fstream>

#include "parallel/comm/self.h"
#include "tests/trainer/checkpoint/support.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/writer.h"

namespace longspan::test {
namespace {

using trainer::FindLatest;
using trainer::RetentionPolicy;
using trainer::StepDirectoryName;

class DirectoryTest : public testing::Test {
 protected:
  void Save(int64_t step) { SaveMixed(path(), 1, step, 1, {.retention = {.keep_last = 1000}}); }
  std::filesystem::path Step(int64_t step) const { return path() / StepDirectoryName(step); }
  void Damage(int64_t step) { std::filesystem::resize_file(Step(step) / "shard_00000.binpb", 5); }
  const std::filesystem::path& path() const { return directory_.path(); }
  TemporaryDirectory directory_;
};

TEST_F(DirectoryTest, LatestIsTheHighestStepNumber) {
  EXPECT_FALSE(FindLatest(path()).has_value());
  EXPECT_FALSE(FindLatest(path() / "missing").has_value());
  // In order of names, the nine-digit step would come before the eight-digit one.
  for (const int64_t step : {int64_t{99999999}, int64_t{100000000}, int64_t{0}}) Save(step);
  EXPECT_EQ(FindLatest(path()), Step(100000000));
}

TEST_F(DirectoryTest, LeftoversAndForeignNamesAreNotCheckpoints) {
  Save(5);
  for (const char* name : {"step_00000009.tmp", "step_00000009.deleting", "step_9", "step_-0000009",
                           "step_00000009x", "step_00000009.superseded", "other"}) {
    std::filesystem::copy(Step(5), path() / name);
  }
  std::vector<std::string> skipped;
  EXPECT_EQ(FindLatest(path(), &skipped), Step(5));
  EXPECT_TRUE(skipped.empty());
}

TEST_F(DirectoryTest, UnusableOnesAreSkippedWithTheReason) {
  for (const int64_t step : {1, 2, 3}) Save(step);
  Damage(3);
  std::filesystem::remove(Step(2) / "manifest.binpb");
  std::vector<std::string> skipped;
  EXPECT_EQ(FindLatest(path(), &skipped), Step(1));
  ASSERT_EQ(skipped.size(), 2u);
  EXPECT_NE(skipped[0].find("step_00000003/shard_00000.binpb has 5 bytes"), std::string::npos)
      << skipped[0];
  EXPECT_NE(skipped[1].find("step_00000002"), std::string::npos) << skipped[1];
}

TEST_F(DirectoryTest, ARunWithOnlyUnusableCheckpointsDoesNotStartOverInSilence) {
  Save(1);
  Damage(1);
  const std::string error = ErrorOf<CheckpointError>([&] { FindLatest(path()); });
  EXPECT_NE(error.find("none of the 1 checkpoints"), std::string::npos) << error;
}

TEST_F(DirectoryTest, AReplacedCheckpointCountsWhileItsSuccessorIsMissing) {
  Save(4);
  std::filesystem::copy(Step(4), path() / "step_00000004.replaced");
  EXPECT_EQ(FindLatest(path()), Step(4));
  std::filesystem::remove_all(Step(4));
  EXPECT_EQ(FindLatest(path()), path() / "step_00000004.replaced");
  trainer::CleanLeftovers(path());
  EXPECT_EQ(FindLatest(path()), Step(4));
  // With an unusable successor it has to stay.
  std::filesystem::copy(Step(4), path() / "step_00000004.replaced");
  Damage(4);
  trainer::CleanLeftovers(path());
  EXPECT_EQ(FindLatest(path()), path() / "step_00000004.replaced");
}

TEST_F(DirectoryTest, RetentionKeepsTheNewestAndTheRoundOnes) {
  for (int64_t step = 10; step <= 80; step += 10) Save(step);
  const auto retired = trainer::RetireCheckpoints(path(), 80, {.keep_last = 2, .keep_every = 40});
  EXPECT_EQ(retired.size(), 5u);
  for (const auto& gone : retired) trainer::RemoveTree(gone);
  EXPECT_EQ(Names(path()),
            (std::set<std::string>{"step_00000040", "step_00000070", "step_00000080"}));
}

TEST_F(DirectoryTest, RetentionCountsUsableOnesOnlyAndLeavesLaterStepsAlone) {
  for (const int64_t step : {1, 2, 3, 4, 5, 6}) Save(step);
  Damage(4);
  // A run resumed from step 2 has just saved step 3; 5 and 6 belong to what it abandoned.
  EXPECT_EQ(trainer::RetireCheckpoints(path(), 3, {.keep_last = 1}).size(), 2u);
  EXPECT_EQ(FindLatest(path()), Step(6));
  EXPECT_TRUE(std::filesystem::exists(Step(5)));
  EXPECT_TRUE(std::filesystem::exists(Step(3)));
  EXPECT_TRUE(std::filesystem::exists(Step(4)));
  // Damaged ones do not use up the places of good ones.
  Damage(5);
  Damage(6);
  EXPECT_TRUE(trainer::RetireCheckpoints(path(), 6, {.keep_last = 1}).empty());
  EXPECT_EQ(FindLatest(path()), Step(3));
}

TEST_F(DirectoryTest, AFailingRemovalIsNotFatal) {
  for (const int64_t step : {1, 2, 3}) Save(step);
  // The name that step 1 would get is taken by a directory with content.
  std::filesystem::create_directories(path() / "step_00000001.deleting" / "content");
  const auto retired = trainer::RetireCheckpoints(path(), 3, {.keep_last = 1});
  EXPECT_EQ(retired, std::vector<std::filesystem::path>{path() / "step_00000002.deleting"});
  EXPECT_TRUE(std::filesystem::exists(Step(1)));
}

TEST_F(DirectoryTest, TheWriterAppliesRetention) {
  parallel::SelfCommunicator world;
  Context ctx({.threads = 1});
  trainer::CheckpointWriter writer(
      {.directory = path(), .retention = {.keep_last = 2, .keep_every = 3}}, world);
  for (int64_t step = 1; step <= 7; ++step) {
    writer.Save(SampleInfo(step), MixedTensors(ctx, 1));
    EXPECT_TRUE(writer.Wait());
    EXPECT_EQ(FindLatest(path()), Step(step));
  }
  writer.Save(SampleInfo(8), MixedTensors(ctx, 1));  // clears what step 7 retired
  EXPECT_TRUE(writer.Wait());
  std::set<std::string> names = Names(path());
  names.erase("step_00000007.deleting");
  names.erase("step_00000005.deleting");
  EXPECT_EQ(names, (std::set<std::string>{"step_00000003", "step_00000006", "step_00000007",
                                          "step_00000008"}));
}

TEST_F(DirectoryTest, AbandonedStepsAreSetAside) {
  for (const int64_t step : {1, 2, 3}) Save(step);
  std::filesystem::create_directories(path() / "step_00000003.superseded");
  const auto moved = trainer::SetAsideNewerThan(path(), 1);
  EXPECT_EQ(moved, (std::vector<std::filesystem::path>{path() / "step_00000003.superseded.2",
                                                       path() / "step_00000002.superseded"}));
  EXPECT_EQ(FindLatest(path()), Step(1));
  EXPECT_TRUE(trainer::SetAsideNewerThan(path(), 1).empty());
}

TEST_F(DirectoryTest, ResolvesWhatAUserMeans) {
  const auto run = path() / "run";
  for (const int64_t step : {1, 2}) SaveMixed(run / "checkpoints", 1, step, 1);
  const auto newest = run / "checkpoints" / StepDirectoryName(2);
  EXPECT_EQ(trainer::ResolveCheckpoint(run), newest);
  EXPECT_EQ(trainer::ResolveCheckpoint(run / "checkpoints"), newest);
  EXPECT_EQ(trainer::ResolveCheckpoint(newest), newest);
  const auto missing = run / "checkpoints" / StepDirectoryName(3);
  const std::string error = ErrorOf<CheckpointError>([&] { trainer::ResolveCheckpoint(missing); });
  EXPECT_NE(error.find("there is no checkpoint at " + missing.string()), std::string::npos)
      << error;
  EXPECT_NE(error.find(newest.string()), std::string::npos) << error;
}

TEST(IdentityTest, EachDifferingFieldHasASentence) {
  const std::map<std::string, std::string> saved = {
      {"model.num_layers", "8"}, {"run.seed", "1"}, {"data.corpus", "a"}, {"same", "x"}};
  const std::map<std::string, std::string> current = {
      {"model.num_layers", "9"}, {"run.seed", "1"}, {"optimizer", "adamw"}, {"same", "x"}};
  EXPECT_EQ(trainer::DifferingIdentity(saved, current),
            (std::vector<std::string>{"data.corpus is a in the checkpoint and is not set now",
                                      "model.num_layers is 8 in the checkpoint and 9 now",
                                      "optimizer is not set in the checkpoint and is adamw now"}));
  EXPECT_TRUE(trainer::DifferingIdentity(saved, saved).empty());
}

}  // namespace
}  // namespace longspan::test
