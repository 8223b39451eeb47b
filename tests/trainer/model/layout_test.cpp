// The same run in every layout, on threads: losses and final weights equal those of one rank.
#include <gtest/gtest.h>

#include <cmath>
#include <mutex>

#include "parallel/comm/local.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/trainer.h"

namespace longspan::test {
namespace {

using namespace trainer;
using parallel::PlacementKind;
using parallel::StrategyKind;

struct RunResult {
  std::vector<double> losses, norms;
  std::vector<int64_t> valid;
  double validation = 0;
  std::vector<std::pair<std::string, Vec>> initial_weights, weights;
};

class LayoutTest : public ::testing::Test {
 protected:
  LayoutTest() {
    WriteCorpus((folder_.path() / "train").string(), 19, 400, 150, 1);
    WriteCorpus((folder_.path() / "validation").string(), 19, 40, 120, 2);
  }

  TrainOptions Options(const ops::AttentionPattern& pattern, bool documents, DType dtype) const {
    TrainOptions o;
    o.model = SmallModel(dtype);
    o.model.mixers = {{"pattern", pattern}};
    o.model.layers = {0, 0};
    o.steps = 4;
    o.context_length = 512;
    o.global_batch_tokens = 8 * 512;
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.validation = {{(folder_.path() / "validation").string(), 1}};
    o.document_mask = documents;
    o.adamw.lr = 1e-2;
    o.schedule = {.kind = ScheduleKind::kCosine, .warmup_steps = 2, .final_fraction = 0.1};
    return o;
  }

  static std::vector<std::pair<std::string, Vec>> WeightsOf(Trainer& trainer) {
    std::vector<std::pair<std::string, Vec>> weights;
    for (const NamedTensor& t : trainer.State()) {
      if (t.name.starts_with("weights/")) weights.push_back({t.name, ToVec(t.tensor)});
    }
    return weights;
  }

  static RunResult Train(TrainOptions o, int dp, int cp) {
    o.dp = dp;
    o.cp = cp;
    RunResult result;
    std::mutex mutex;
    parallel::RunLocal(dp * cp, [&](parallel::Communicator& world) {
      parallel::DeviceMesh mesh(world, {.dp = dp, .cp = cp});
      Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
      ctx.SetProgress([&] { mesh.axis("cp").Progress(); });
      Trainer trainer(ctx, mesh, o);
      RunResult mine;
      mine.initial_weights = WeightsOf(trainer);
      while (trainer.step() < o.steps) {
        const StepResult step = trainer.Step();
        mine.losses.push_back(step.loss);
        mine.norms.push_back(step.grad_norm);
        mine.valid.push_back(step.valid_tokens);
      }
      mine.validation = trainer.Evaluate().loss;
      mine.weights = WeightsOf(trainer);
      std::lock_guard lock(mutex);
      if (result.losses.empty()) {
        result = mine;
      } else {  // every rank leaves with the same bits
        EXPECT_EQ(result.losses, mine.losses);
        EXPECT_EQ(result.weights, mine.weights);
        EXPECT_EQ(result.validation, mine.validation);
      }
    });
    return result;
  }

  static void ExpectEqualLosses(const RunResult& got, const RunResult& expected,
                                double loss_tolerance) {
    ASSERT_EQ(got.losses.size(), expected.losses.size());
    EXPECT_EQ(got.valid, expected.valid);
    for (size_t i = 0; i < got.losses.size(); ++i) {
      EXPECT_NEAR(got.losses[i], expected.losses[i], loss_tolerance * expected.losses[i]);
      EXPECT_NEAR(got.norms[i], expected.norms[i], 10 * loss_tolerance * expected.norms[i]);
    }
    EXPECT_NEAR(got.validation, expected.validation, loss_tolerance * expected.validation);
  }

  static void ExpectEqual(const RunResult& got, const RunResult& expected, double loss_tolerance,
                          double weight_tolerance) {
    ExpectEqualLosses(got, expected, loss_tolerance);
    ASSERT_EQ(got.weights.size(), expected.weights.size());
    for (size_t i = 0; i < got.weights.size(); ++i) {
      EXPECT_LT(RelMax(got.weights[i].second, expected.weights[i].second), weight_tolerance)
          << got.weights[i].first;
    }
  }

  // Compares how far training has moved each weight tensor: the error against the movement's own
  // length is 1 for a tensor that was not trained and 2 for one that went the other way.
  static void ExpectEqualMovement(const RunResult& got, const RunResult& expected,
                                  double tolerance) {
    const auto movement = [](const RunResult& run, size_t i) {
      Vec moved = run.weights[i].second;
      for (size_t j = 0; j < moved.size(); ++j) moved[j] -= run.initial_weights[i].second[j];
      return moved;
    };
    ASSERT_EQ(got.weights.size(), expected.weights.size());
    for (size_t i = 0; i < got.weights.size(); ++i) {
      EXPECT_LT(RelRms(movement(got, i), movement(expected, i)), tolerance) << got.weights[i].first;
    }
  }

  TemporaryFolder folder_;
};

struct PatternCase {
  const char* name;
  ops::AttentionPattern pattern;
  bool documents;
  ops::Normalization normalization = ops::Normalization::kSoftmax;
};

std::vector<PatternCase> Patterns() {
  return {{"causal", ops::AttentionPattern::Causal(), false},
          {"window", ops::AttentionPattern::Window(200, 3), false},
          {"s2", ops::AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 2}), false},
          {"documents", ops::AttentionPattern::Causal(), true},
          {"sigmoid", ops::AttentionPattern::Window(200, 3), true, ops::Normalization::kSigmoid}};
}

TEST_F(LayoutTest, TwoContextRanksEqualOneInEveryCombination) {
  for (const PatternCase& c : Patterns()) {
    TrainOptions o = Options(c.pattern, c.documents, DType::kF64);
    o.model.mixers[0].normalization = c.normalization;
    const RunResult one = Train(o, 1, 1);
    EXPECT_LT(one.losses.back(), one.losses.front()) << "the model does not learn";
    for (auto placement : {PlacementKind::kContiguous, PlacementKind::kZigzag}) {
      for (auto strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
        SCOPED_TRACE(Str(c.name, " ", ToString(placement), " ", ToString(strategy)));
        TrainOptions two = o;
        two.placement = placement;
        two.strategy.kind = strategy;
        ExpectEqual(Train(two, 1, 2), one, 1e-10, 1e-10);
      }
    }
  }
}

TEST_F(LayoutTest, AlignedDocumentsInEveryLayout) {
  TrainOptions o = Options(Patterns()[2].pattern, true, DType::kF64);
  const RunResult packed = Train(o, 1, 1);
  o.align_documents = true;
  const RunResult one = Train(o, 1, 1);
  for (size_t i = 0; i < one.valid.size(); ++i) EXPECT_LT(one.valid[i], packed.valid[i]);
  ExpectEqual(Train(o, 1, 2), one, 1e-10, 1e-10);
  ExpectEqual(Train(o, 2, 2), one, 1e-10, 1e-10);
}

TEST_F(LayoutTest, LargerLayoutsAndMicroBatchesEqualOne) {
  const PatternCase c = Patterns()[2];
  TrainOptions o = Options(c.pattern, true, DType::kF64);
  const RunResult one = Train(o, 1, 1);
  ExpectEqual(Train(o, 2, 1), one, 1e-10, 1e-10);
  ExpectEqual(Train(o, 2, 2), one, 1e-10, 1e-10);
  ExpectEqual(Train(o, 1, 4), one, 1e-10, 1e-10);
  o.micro_batch_rows = 4;
  ExpectEqual(Train(o, 2, 2), one, 1e-10, 1e-10);
}

TEST_F(LayoutTest, SinglePrecision) {
  const TrainOptions o = Options(Patterns()[2].pattern, true, DType::kF32);
  const RunResult one = Train(o, 1, 1);
  ExpectEqual(Train(o, 2, 2), one, 1e-5, 1e-3);
}

// Low precision follows the exact run: bf16 keeps 8 bits, so losses of a few steps agree to about
// 1 %. Weights agree less well, because Adam moves a weight by its learning rate even where the
// gradient is smaller than its rounding error.
TEST_F(LayoutTest, Bf16FollowsF64) {
  const TrainOptions exact = Options(Patterns()[0].pattern, true, DType::kF64);
  const RunResult one = Train(exact, 1, 1);
  TrainOptions o = Options(Patterns()[0].pattern, true, DType::kBF16);
  const RunResult cp = Train(o, 1, 2);
  ExpectEqualLosses(cp, one, 2e-2);
  ExpectEqualMovement(cp, one, 0.3);
  o.model.residual = DType::kF32;
  const RunResult dp = Train(o, 2, 1);
  ExpectEqualLosses(dp, one, 2e-2);
  ExpectEqualMovement(dp, one, 0.3);
}

TEST_F(LayoutTest, NonFiniteGradientStopsOrSkipsWithoutTouchingWeights) {
  TrainOptions o = Options(Patterns()[0].pattern, true, DType::kF32);
  o.dp = 2;
  auto run = [&](NonFinitePolicy policy, const std::function<void(Trainer&)>& check) {
    o.on_nonfinite = policy;
    o.max_skipped_steps = 2;
    parallel::RunLocal(2, [&](parallel::Communicator& world) {
      parallel::DeviceMesh mesh(world, {.dp = 2, .cp = 1});
      Context ctx(ContextOptions{.threads = 1});
      Trainer trainer(ctx, mesh, o);
      // One rank alone goes wrong; all must notice.
      if (world.rank() == 1) {
        trainer.parameters().Find("model.norm.weight").value.data<float>()[0] =
            std::numeric_limits<float>::quiet_NaN();
      }
      check(trainer);
    });
  };
  EXPECT_THROW(run(NonFinitePolicy::kStop, [](Trainer& t) { t.Step(); }), Error);
  run(NonFinitePolicy::kSkip, [](Trainer& t) {
    const Vec before = ToVec(t.State()[0].tensor);
    EXPECT_TRUE(t.Step().skipped);
    EXPECT_TRUE(t.Step().skipped);
    EXPECT_EQ(ToVec(t.State()[0].tensor), before);
    EXPECT_EQ(t.skipped_steps(), 2);
    EXPECT_THROW(t.Step(), Error);
  });
}

}  // namespace
}  // namespace longspan::test
