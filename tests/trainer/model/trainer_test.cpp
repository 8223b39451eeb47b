// What ranks must agree on before and after a step, and what of it a checkpoint carries on.
#include <gtest/gtest.h>

#include <limits>
#include <memory>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/agreement.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/trainer.h"

namespace longspan::test {
namespace {

using namespace trainer;

class TrainerTest : public ::testing::Test {
 protected:
  TrainerTest() {
    WriteCorpus((folder_.path() / "train").string(), 19, 100, 150, 1);
    WriteCorpus((folder_.path() / "other").string(), 19, 100, 150, 2);
  }

  TrainOptions Options(const char* train = "train") const {
    TrainOptions o;
    o.model = SmallModel(DType::kF32);
    o.model.mixers = {{"causal", ops::AttentionPattern::Causal()}};
    o.model.layers = {0, 0};
    o.steps = 6;
    o.context_length = 256;
    o.global_batch_tokens = 512;
    o.train = {{(folder_.path() / train).string(), 1}};
    o.adamw.lr = 1e-2;
    return o;
  }

  TemporaryFolder folder_;
};

std::string ErrorOf(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST_F(TrainerTest, RanksWithOtherDataAreRefusedOnAllRanks) {
  parallel::RunLocal(2, [&](parallel::Communicator& world) {
    parallel::DeviceMesh mesh(world, {.dp = 1, .cp = 2});
    Context ctx(ContextOptions{.threads = 1});
    TrainOptions same = Options(), other = Options(world.rank() == 0 ? "train" : "other");
    same.cp = other.cp = 2;
    EXPECT_NO_THROW(Trainer(ctx, mesh, same));
    const std::string error = ErrorOf([&] { Trainer(ctx, mesh, other); });
    EXPECT_NE(error.find("the training data of rank 1 is not that of rank 0"), std::string::npos)
        << error;
    same.validation = other.train;
    const std::string validation = ErrorOf([&] { Trainer(ctx, mesh, same); });
    EXPECT_NE(validation.find("the validation data of rank 1"), std::string::npos) << validation;
  });
}

TEST_F(TrainerTest, ErrorsOfOneRankReachAll) {
  parallel::RunLocal(3, [&](parallel::Communicator& world) {
    EXPECT_EQ(ErrorOf([&] {
                OnAllRanks(world, [&] {
                  if (world.rank() == 1) throw Error("from rank 1");
                });
              }),
              "from rank 1");
    EXPECT_NO_THROW(RequireSame(world, "it", 7));
    EXPECT_NE(ErrorOf([&] { RequireSame(world, "it", world.rank() == 2 ? 8 : 7); }), "");
  });
}

// A resumed run that forgot its skipped steps would get a new allowance at every restart.
TEST_F(TrainerTest, SkippedStepsCountOnAfterAResume) {
  parallel::SelfCommunicator world;
  parallel::DeviceMesh mesh(world, {.dp = 1, .cp = 1});
  Context ctx(ContextOptions{.threads = 1});
  TrainOptions o = Options();
  o.on_nonfinite = NonFinitePolicy::kSkip;
  o.max_skipped_steps = 2;
  const auto spoil = [](Trainer& trainer) {
    trainer.parameters().Find("model.norm.weight").value.data<float>()[0] =
        std::numeric_limits<float>::quiet_NaN();
  };
  Trainer first(ctx, mesh, o);
  EXPECT_FALSE(first.Step().skipped);
  Tensor norm = first.parameters().Find("model.norm.weight").value;
  const float healthy = norm.data<float>()[0];
  spoil(first);
  EXPECT_TRUE(first.Step().skipped);
  EXPECT_TRUE(first.Step().skipped);
  norm.data<float>()[0] = healthy;

  CheckpointWriter writer({.directory = folder_.path() / "checkpoints"}, world);
  writer.Save(first.Info("config"), first.State());
  writer.Wait();
  Trainer second(ctx, mesh, o);
  second.Resume(CheckpointReader::Open(folder_.path() / "checkpoints" / "step_00000003"));
  EXPECT_EQ(second.step(), 3);
  EXPECT_EQ(second.skipped_steps(), 2);
  EXPECT_EQ(second.Step().loss, first.Step().loss);
  spoil(second);
  EXPECT_THROW(second.Step(), StepFailure);
}

}  // namespace
}  // namespace longspan::test
