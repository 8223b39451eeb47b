// Runs with sharded state against runs in which every rank holds all of it, and against one rank.
#include <gtest/gtest.h>

#include <limits>

#include "parallel/comm/self.h"
#include "tests/trainer/model/duo_support.h"
#include "tests/trainer/model/zero_support.h"
#include "trainer/checkpoint/writer.h"

namespace longspan::test {
namespace {

using namespace trainer;

class ZeroTest : public ::testing::Test {
 protected:
  ZeroTest() {
    WriteCorpus((folder_.path() / "train").string(), 19, 400, 150, 1);
    WriteCorpus((folder_.path() / "validation").string(), 19, 20, 120, 2);
  }

  // Clipping is always active, so that a norm that is wrong changes the weights as well.
  TrainOptions Options(DType dtype) const {
    TrainOptions o;
    o.model = SmallModel(dtype);
    o.model.layers = {0, 1, 0};
    o.steps = 5;
    o.context_length = 128;
    o.global_batch_tokens = 8 * 128;
    o.placement = parallel::PlacementKind::kContiguous;
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.validation = {{(folder_.path() / "validation").string(), 1}};
    o.adamw.lr = 1e-2;
    o.clip_norm = 0.05;
    o.schedule = {.kind = ScheduleKind::kCosine, .warmup_steps = 2, .final_fraction = 0.1};
    return o;
  }
  TrainOptions DuoOptions(DType dtype) const {
    TrainOptions o = Options(dtype);
    o.model = GatedModel(dtype, 5, 70);
    o.objective = DuoObjective(0.05);
    o.validation.clear();
    o.adamw.lr = 0.05;
    return o;
  }

  TemporaryFolder folder_;
};

TEST_F(ZeroTest, EveryStageInEveryLayoutEqualsOneRank) {
  TrainOptions o = Options(DType::kF64);
  const ZeroRun one = RunZero(o, {});
  EXPECT_LT(one.losses.back(), one.losses.front()) << "the model does not learn";
  EXPECT_GT(one.norms.back(), o.clip_norm);
  for (const auto& [dp, cp] : {std::pair{2, 1}, {1, 2}, {2, 2}, {4, 1}}) {
    for (const int stage : {0, 1, 2, 3}) {
      for (const bool recompute : {false, true}) {
        if (stage == 0 && recompute) continue;
        const ZeroLayout layout{dp, cp, stage};
        SCOPED_TRACE(Str(layout.Name(), recompute ? " recompute" : ""));
        o.model.recompute_layers = recompute;
        ExpectNear(RunZero(o, layout), one, 1e-10);
      }
    }
  }
}

TEST_F(ZeroTest, GroupsThatHoldCopiesEqualOneRank) {
  TrainOptions o = Options(DType::kF64);
  const ZeroRun one = RunZero(o, {});
  for (const int stage : {1, 2, 3}) {
    for (const ZeroLayout& layout :
         {ZeroLayout{4, 1, stage, 2}, ZeroLayout{2, 2, stage, 2}, ZeroLayout{2, 2, stage, 4}}) {
      SCOPED_TRACE(layout.Name());
      ExpectNear(RunZero(o, layout), one, 1e-10);
    }
  }
}

// The embedding is used at both ends of the model; a GELU layer has other parameters.
TEST_F(ZeroTest, TiedEmbeddings) {
  TrainOptions o = Options(DType::kF64);
  o.model.tie_embeddings = true;
  o.model.mlp = MlpKind::kGelu;
  const ZeroRun one = RunZero(o, {});
  for (const int stage : {1, 2, 3}) {
    for (const bool recompute : {false, true}) {
      SCOPED_TRACE(Str(stage, recompute ? " recompute" : ""));
      o.model.recompute_layers = recompute;
      ExpectNear(RunZero(o, {2, 1, stage}), one, 1e-10);
    }
  }
}

// Weights are used in entries of their own kinds there: of layers without their attention, of
// tiles.
TEST_F(ZeroTest, KeptAttentionAndTiles) {
  TrainOptions o = Options(DType::kF64);
  const ZeroRun one = RunZero(o, {});
  o.model.recompute_layers = o.model.keep_attention = true;
  o.model.mlp_tile_tokens = 48;
  ExpectNear(RunZero(o, {2, 2, 3}), one, 1e-10);
  ExpectNear(RunZero(o, {2, 1, 2}), one, 1e-10);
}

// A model of one layer has no layer to prefetch behind another.
TEST_F(ZeroTest, OneLayerOnOneRankAndOnThree) {
  TrainOptions o = Options(DType::kF64);
  o.model.layers = {1};
  o.global_batch_tokens = 6 * 128;
  const ZeroRun one = RunZero(o, {});
  for (const int stage : {1, 2, 3}) {
    ExpectNear(RunZero(o, {1, 1, stage}), one, 1e-10);
    ExpectNear(RunZero(o, {3, 1, stage}), one, 1e-10);
  }
}

// Gates of two heads on up to four ranks: parts that hold nothing, and frozen weights around them.
TEST_F(ZeroTest, GatesOfAFrozenModel) {
  TrainOptions o = DuoOptions(DType::kF64);
  const ZeroRun one = RunZero(o, {});
  EXPECT_NE(one.Weights().at("weights/model.layers.0.self_attn.duo_alpha"), Vec(2, 1.0));
  for (const ZeroLayout& layout : {ZeroLayout{2, 1, 1}, ZeroLayout{2, 2, 2}, ZeroLayout{2, 1, 3},
                                   ZeroLayout{2, 2, 3}, ZeroLayout{4, 1, 3, 2}}) {
    for (const bool recompute : {false, true}) {
      SCOPED_TRACE(Str(layout.Name(), recompute ? " recompute" : ""));
      o.model.recompute_layers = recompute;
      ExpectNear(RunZero(o, layout), one, 1e-9);
    }
  }
  o.adamw.lr = 3;  // farther than a gate goes
  o.objective.regularization = 100;
  const ZeroRun closed = RunZero(o, {2, 2, 3});
  EXPECT_EQ(closed.Weights().at("weights/model.layers.2.self_attn.duo_alpha"), Vec(2, 0.0));
}

// These learn from a forward pass: nothing flows back through the frozen weights.
TEST_F(ZeroTest, GatesThatChooseBlocks) {
  TrainOptions o = Options(DType::kF64);
  o.model.mixers = {{.name = "seer",
                     .pattern = ops::AttentionPattern::Causal(),
                     .seer = SeerOptions{.gate_dim = 6, .selection = {.top_k = 2}}},
                    {.name = "dense", .pattern = ops::AttentionPattern::Causal()}};
  o.model.gates_only = true;
  o.objective = {.kind = ObjectiveKind::kSeerGates, .drop_first_quarter = true};
  o.context_length = 320;
  o.global_batch_tokens = 8 * 320;
  o.validation.clear();
  o.clip_norm = 0;
  const ZeroRun one = RunZero(o, {});
  for (const ZeroLayout& layout :
       {ZeroLayout{2, 1, 1}, ZeroLayout{2, 1, 2}, ZeroLayout{2, 1, 3}, ZeroLayout{4, 1, 3, 2}}) {
    SCOPED_TRACE(layout.Name());
    ExpectNear(RunZero(o, layout), one, 1e-9);
  }
}

// A border between what decays and what does not lies anywhere in a part. The first step by its
// formula: weight decay moves a matrix of a layer or the head by -lr * decay * w, and nothing else.
TEST_F(ZeroTest, OnlyMatricesOfLayersAndHeadDecay) {
  TrainOptions o = Options(DType::kF64);
  o.schedule = {};
  o.steps = 1;
  o.validation.clear();
  constexpr double kDecay = 0.3;
  for (const ZeroLayout& layout : {ZeroLayout{}, ZeroLayout{2, 1, 1}, ZeroLayout{3, 1, 2},
                                   ZeroLayout{2, 2, 3}, ZeroLayout{4, 1, 3, 2}}) {
    SCOPED_TRACE(layout.Name());
    o.global_batch_tokens = 2 * layout.dp * 128;
    const auto weights = [&](double decay, int64_t steps) {
      o.adamw.weight_decay = decay;
      return RunZero(o, layout, nullptr, steps).Weights();
    };
    const auto first = weights(kDecay, 0), plain = weights(0, 1), decayed = weights(kDecay, 1);
    for (const auto& [name, w] : first) {
      const bool decays = name.ends_with("_proj.weight") || name.ends_with("lm_head.weight");
      for (size_t i = 0; i < w.size(); ++i) {
        const double expected = plain.at(name)[i] - (decays ? o.adamw.lr * kDecay * w[i] : 0);
        ASSERT_NEAR(decayed.at(name)[i], expected, 1e-14) << name << " at " << i;
      }
    }
  }
}

// One rank alone goes wrong, where only it holds the weight.
TEST_F(ZeroTest, WhatIsNotFiniteStopsAllRanksAlike) {
  TrainOptions o = Options(DType::kF64);
  o.on_nonfinite = NonFinitePolicy::kSkip;
  o.max_skipped_steps = 1;
  o.validation.clear();
  const RankBody body = [](parallel::CountingCommunicator& world, Trainer& trainer) {
    EXPECT_FALSE(trainer.Step().skipped);
    Tensor master = trainer.parameters().buckets()[2].owned[0].master;
    const double healthy = master.data<double>()[0];
    if (world.rank() == 2) master.data<double>()[0] = std::numeric_limits<double>::quiet_NaN();
    const auto first = [&] { return ToVec(trainer.parameters().buckets()[1].owned[0].master); };
    const Vec before = first();
    EXPECT_TRUE(trainer.Step().skipped);
    EXPECT_EQ(first(), before);
    EXPECT_THROW(trainer.Step(), StepFailure);
    EXPECT_EQ(first(), before);
    master.data<double>()[0] = healthy;  // for what puts the state together
  };
  RunZero(o, {2, 2, 3}, body, 0);
}

class ZeroCheckpointTest : public ZeroTest {
 protected:
  std::filesystem::path Save(const TrainOptions& o, const ZeroLayout& layout, int64_t steps) const {
    const auto directory = folder_.path() / layout.Name();
    const RankBody body = [&](parallel::CountingCommunicator& world, Trainer& trainer) {
      while (trainer.step() < steps) trainer.Step();
      CheckpointWriter writer({.directory = directory, .max_record_bytes = 4096}, world);
      writer.Save(trainer.Info("config"), trainer.State());
      writer.Wait();
    };
    RunZero(o, layout, body, steps);
    return directory / Str("step_0000000", steps);
  }
  static ZeroRun Resume(const TrainOptions& o, const ZeroLayout& layout,
                        const std::filesystem::path& checkpoint) {
    return RunZero(o, layout, [&](parallel::CountingCommunicator&, Trainer& trainer) {
      trainer.Resume(CheckpointReader::Open(checkpoint));
    });
  }
};

TEST_F(ZeroCheckpointTest, AnyLayoutContinuesAnyOther) {
  const TrainOptions o = Options(DType::kF64);
  ZeroRun whole = RunZero(o, {});
  whole.losses.erase(whole.losses.begin(), whole.losses.begin() + 2);
  whole.norms.erase(whole.norms.begin(), whole.norms.begin() + 2);
  const std::vector<std::pair<ZeroLayout, ZeroLayout>> pairs = {
      {{2, 1, 0}, {2, 2, 3}},    {{2, 2, 3}, {1, 1, 0}},    {{4, 1, 1}, {2, 1, 2}},
      {{2, 1, 2}, {4, 1, 3, 2}}, {{4, 1, 3, 2}, {2, 2, 1}}, {{4, 1, 2, 2}, {1, 2, 3}}};
  for (const auto& [from, to] : pairs) {
    SCOPED_TRACE(from.Name() + " to " + to.Name());
    const auto checkpoint = Save(o, from, 2);
    ExpectNear(Resume(o, to, checkpoint), whole, 1e-10);
  }
}

TEST_F(ZeroCheckpointTest, TheSameLayoutContinuesBitForBit) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const TrainOptions o = Options(dtype);
    for (const ZeroLayout& layout :
         {ZeroLayout{2, 1, 1}, ZeroLayout{2, 2, 2}, ZeroLayout{2, 2, 3}, ZeroLayout{4, 1, 3, 2}}) {
      SCOPED_TRACE(Str(layout.Name(), " ", ToString(dtype)));
      const ZeroRun whole = RunZero(o, layout);
      const auto checkpoint = Save(o, layout, 3);
      const ZeroRun resumed = Resume(o, layout, checkpoint);
      EXPECT_EQ(resumed.losses, Vec(whole.losses.begin() + 3, whole.losses.end()));
      EXPECT_EQ(resumed.state, whole.state);
      EXPECT_EQ(resumed.validation, whole.validation);
      std::filesystem::remove_all(checkpoint.parent_path());
    }
  }
}

// Weights only, into other stages; and what evaluates a checkpoint.
TEST_F(ZeroCheckpointTest, WeightsStartRunsAndAreEvaluatedInEveryStage) {
  const TrainOptions o = Options(DType::kF64);
  const auto checkpoint = Save(o, {2, 1, 3}, 2);
  TrainOptions fresh = o;
  fresh.seed = 7;  // so that weights which were not read show
  const auto start = [&](const ZeroLayout& layout) {
    return RunZero(fresh, layout, [&](parallel::CountingCommunicator&, Trainer& trainer) {
      trainer.InitFrom(CheckpointReader::Open(checkpoint));
    });
  };
  const ZeroRun one = start({});
  ExpectNear(start({2, 2, 3}), one, 1e-10);
  ExpectNear(start({4, 1, 1, 2}), one, 1e-10);

  const auto evaluate = [&](const ZeroLayout& layout) {
    TrainOptions e = o;
    layout.Set(e);
    double loss = 0;
    parallel::RunLocal(layout.ranks(), [&](parallel::Communicator& world) {
      Context ctx({.threads = 1});
      parallel::DeviceMesh mesh(world, {.dp = layout.dp, .cp = layout.cp});
      const double mine =
          EvaluateCheckpoint(ctx, mesh, e, CheckpointReader::Open(checkpoint), 0).loss;
      if (world.rank() == 0) loss = mine;
    });
    return loss;
  };
  const double expected = evaluate({});
  EXPECT_NEAR(evaluate({2, 1, 1}), expected, 1e-10 * expected);
  EXPECT_NEAR(evaluate({1, 2, 3}), expected, 1e-10 * expected);
  EXPECT_NEAR(evaluate({4, 1, 3, 2}), expected, 1e-10 * expected);
}

}  // namespace
}  // namespace longspan::test
