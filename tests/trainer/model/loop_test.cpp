// The whole loop of a run in process: what it writes, and how it ends. On a GPU it is one step
// ahead of what it knows.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "parallel/comm/counting.h"
#include "parallel/comm/self.h"
#include "tests/support/device.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/loop.h"

namespace longspan::test {
namespace {

using namespace trainer;

class LoopTest : public ::testing::Test {
 protected:
  LoopTest() { WriteCorpus((folder_.path() / "train").string(), 19, 100, 150, 1); }

  TrainOptions Options() const {
    TrainOptions o;
    o.model = SmallModel(DType::kF32);
    o.model.mixers = {{"causal", ops::AttentionPattern::Causal()}};
    o.model.layers = {0};
    o.steps = 7;
    o.context_length = 64;
    o.global_batch_tokens = 64;
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.validation = o.train;
    o.evaluation_rows = 2;
    o.adamw.lr = 1e-2;
    return o;
  }

  std::filesystem::path RunDirectory(const std::string& name) const {
    return folder_.path() / name;
  }

  RunSummary Train(const TrainOptions& options, const std::string& name,
                   std::function<bool()> stop = nullptr) const {
    Context ctx({.device = TestDevice(), .threads = 2, .poison_buffers = true});
    parallel::SelfCommunicator self;
    parallel::CountingCommunicator world(self);
    world.UseDevice(ctx.runtime());
    parallel::DeviceMesh mesh(world, {.dp = 1, .cp = 1});
    RunSettings settings;
    settings.run_directory = RunDirectory(name);
    settings.config_text = "test";
    settings.quiet = true;
    settings.stop_requested = std::move(stop);
    return RunTraining(ctx, mesh, world, options, settings);
  }

  // Steps of the lines of metrics.jsonl in their order; evaluations as the negative step.
  std::vector<int64_t> Lines(const std::string& name) const {
    std::ifstream in(RunDirectory(name) / "metrics.jsonl");
    std::vector<int64_t> steps;
    for (std::string line; std::getline(in, line);) {
      const auto json = nlohmann::json::parse(line);
      steps.push_back((json.contains("eval") ? -1 : 1) * json["step"].get<int64_t>());
    }
    return steps;
  }
  std::vector<double> Losses(const std::string& name) const {
    std::ifstream in(RunDirectory(name) / "metrics.jsonl");
    std::vector<double> losses;
    for (std::string line; std::getline(in, line);) {
      const auto json = nlohmann::json::parse(line);
      if (json.contains("loss")) losses.push_back(json["loss"].get<double>());
    }
    return losses;
  }

  TemporaryFolder folder_;
};

TEST_F(LoopTest, EveryStepIsWrittenOnceAndInOrder) {
  TrainOptions o = Options();
  o.evaluation_every_steps = 3;
  o.checkpoint_every_steps = 5;
  const RunSummary summary = Train(o, "run");
  EXPECT_EQ(summary.step, 7);
  EXPECT_FALSE(summary.stopped);
  EXPECT_GT(summary.seconds, 0);
  EXPECT_EQ(Lines("run"), (std::vector<int64_t>{1, 2, 3, -3, 4, 5, 6, -6, 7, -7}));
  EXPECT_EQ(summary.last_loss, Losses("run").back());
}

// A checkpoint holds what the steps before it made of the weights, also where more have begun.
TEST_F(LoopTest, AResumedRunGoesOnWithTheSameBits) {
  Train(Options(), "whole");
  TrainOptions o = Options();
  o.checkpoint_every_steps = 4;  // not where the stop is heard of
  int asked = 0;
  const RunSummary stopped = Train(o, "parts", [&asked] { return ++asked > 4; });
  EXPECT_TRUE(stopped.stopped);
  EXPECT_EQ(stopped.step, OnCuda() ? 6 : 5);
  const auto lines = Lines("parts");
  ASSERT_EQ(static_cast<int64_t>(lines.size()), stopped.step);  // also those begun ahead
  EXPECT_EQ(lines.back(), stopped.step);
  EXPECT_TRUE(std::filesystem::exists(RunDirectory("parts") / "checkpoints" /
                                      Str("step_0000000", stopped.step)));
  EXPECT_EQ(Train(o, "parts").step, 7);
  EXPECT_EQ(Lines("parts"), (std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(Losses("parts"), Losses("whole"));
}

TEST_F(LoopTest, AFailedStepEndsTheRunWithWhatWasGood) {
  for (const int64_t every : {0, 1}) {  // 0: on a GPU the next step has begun by then
    const std::string name = Str("every", every);
    TrainOptions o = Options();
    o.adamw.lr = 1e30;  // overflows in the step after the first update
    o.checkpoint_every_steps = every;
    try {
      Train(o, name);
      ADD_FAILURE() << "the run went on";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("step 2: the loss is "), std::string::npos) << e.what();
    }
    EXPECT_EQ(Lines(name), (std::vector<int64_t>{1}));
    const auto checkpoints = RunDirectory(name) / "checkpoints";
    EXPECT_EQ(std::filesystem::exists(checkpoints / "step_00000001"), every == 1);
    EXPECT_FALSE(std::filesystem::exists(checkpoints / "step_00000002"));
  }
}

TEST_F(LoopTest, SkippedStepsAreCountedAndTooManyEndTheRun) {
  TrainOptions o = Options();
  o.adamw.lr = 1e30;
  o.on_nonfinite = NonFinitePolicy::kSkip;
  o.max_skipped_steps = 3;
  try {
    Train(o, "run");
    ADD_FAILURE() << "the run went on";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("step 5: 4 steps have been skipped"), std::string::npos)
        << e.what();
  }
  EXPECT_EQ(Lines("run"), (std::vector<int64_t>{1, 2, 3, 4}));
  o.max_skipped_steps = 10;
  EXPECT_EQ(Train(o, "patient").skipped_steps, 6);
}

}  // namespace
}  // namespace longspan::test
