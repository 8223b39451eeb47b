// What ranks must agree on before and after a step, and what of it a checkpoint carries on.
#include <gtest/gtest.h>

#include <limits>
#include <memory>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/ops/op_test.h"
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
    Context ctx(ContextOptions{.device = TestDevice(), .threads = 1});
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
  Context ctx(ContextOptions{.device = TestDevice(), .threads = 1});
  parallel::SelfCommunicator world;
  world.UseDevice(ctx.runtime());
  parallel::DeviceMesh mesh(world, {.dp = 1, .cp = 1});
  TrainOptions o = Options();
  o.on_nonfinite = NonFinitePolicy::kSkip;
  o.max_skipped_steps = 2;
  const auto spoil = [](Trainer& trainer) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    trainer.parameters().Find("model.norm.weight").value.WriteRange(0, sizeof nan, &nan);
  };
  Trainer first(ctx, mesh, o);
  EXPECT_FALSE(first.Step().skipped);
  Tensor norm = first.parameters().Find("model.norm.weight").value;
  float healthy = 0;
  norm.ReadRange(0, sizeof healthy, &healthy);
  spoil(first);
  EXPECT_TRUE(first.Step().skipped);
  EXPECT_TRUE(first.Step().skipped);
  norm.WriteRange(0, sizeof healthy, &healthy);

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

// Weights and their copies begin with the same bits on every device, and each has its category.
TEST_F(TrainerTest, WeightsStartAlikeOnEveryDevice) {
  Context host(ContextOptions{.threads = 2});
  Context ctx(ContextOptions{.device = TestDevice(), .threads = 1, .poison_buffers = true});
  ModelOptions model = SmallModel(DType::kBF16);
  ParameterStore expected(host, model, /*training=*/true), got(ctx, model, /*training=*/true);
  expected.Initialize(5);
  got.Initialize(5);
  size_t values = 0;
  for (size_t b = 0; b < expected.buckets().size(); ++b) {
    const Bucket &x = expected.buckets()[b], &y = got.buckets()[b];
    EXPECT_TRUE(SameBits(x.master, y.master)) << x.name;
    EXPECT_TRUE(SameBits(x.value, y.value)) << x.name;
    got.ZeroGrads();
    for (const double g : ToVec(y.grad)) EXPECT_EQ(g, 0);
    values += static_cast<size_t>(x.master.numel());
  }
  const BytesByCategory peak = ctx.allocator().peak_by_category();
  const auto bytes = [&](MemoryCategory c) { return peak[static_cast<size_t>(c)]; };
  EXPECT_GE(bytes(MemoryCategory::kParameters), 6 * values);
  EXPECT_GE(bytes(MemoryCategory::kOptimizer), 8 * values);
  EXPECT_EQ(2 * bytes(MemoryCategory::kGradients), bytes(MemoryCategory::kOptimizer));
}

data::MicroBatch SmallBatch(int64_t tokens) {
  data::MicroBatch batch;
  batch.rows = 1;
  batch.row_length = tokens;
  for (int64_t i = 0; i < tokens; ++i) {
    batch.tokens.push_back(static_cast<int32_t>(i % 18));
    batch.labels.push_back(i % 7 == 0 ? -1 : static_cast<int32_t>(i % 17));
    batch.positions.push_back(i);
  }
  batch.doc_ends = {{tokens}};
  return batch;
}

TEST_F(TrainerTest, BatchesReachTheDeviceWithoutWaiting) {
  Context ctx(ContextOptions{.device = TestDevice(), .threads = 1, .poison_buffers = true});
  const TrainOptions o = Options();
  BatchBuilder builder(o.model, {parallel::PlacementKind::kZigzag, 1, 128, 1}, o.strategy, 0);
  auto prepared = builder.Build(SmallBatch(128));
  const LocalBatch device = ToDevice(ctx, prepared->local);
  const auto expect_same = [](const Tensor& on_device, const Tensor& host) {
    EXPECT_EQ(on_device.device(), TestDevice());
    EXPECT_EQ(host.device().kind, DeviceKind::kCpu);
    EXPECT_TRUE(SameBits(on_device, host));
  };
  const LocalBatch& host = prepared->local;
  expect_same(device.ids, host.ids);
  expect_same(device.labels, host.labels);
  expect_same(device.rope.cos, host.rope.cos);
  expect_same(device.rope.sin, host.rope.sin);
  expect_same(device.order.tokens, host.order.tokens);
  expect_same(device.order.pieces, host.order.pieces);
  EXPECT_EQ(device.plans, host.plans);
}

// Kernels cannot say which token was wrong; the host can.
TEST_F(TrainerTest, TokensOutsideTheVocabularyAreNamed) {
  const TrainOptions o = Options();
  BatchBuilder builder(o.model, {parallel::PlacementKind::kZigzag, 1, 128, 1}, o.strategy, 0);
  const auto error = [&](const std::function<void(data::MicroBatch&)>& spoil) {
    data::MicroBatch batch = SmallBatch(128);
    spoil(batch);
    return ErrorOf([&] { builder.Build(batch); });
  };
  EXPECT_EQ(error([](auto&) {}), "");
  EXPECT_NE(error([](auto& b) { b.tokens[77] = 19; }).find("token id 19"), std::string::npos);
  EXPECT_NE(error([](auto& b) { b.tokens[77] = -1; }).find("token id -1"), std::string::npos);
  EXPECT_NE(error([](auto& b) { b.labels[3] = 19; }).find("label 19"), std::string::npos);
  EXPECT_NE(error([](auto& b) { b.labels[3] = -2; }).find("label -2"), std::string::npos);
}

}  // namespace
}  // namespace longspan::test
