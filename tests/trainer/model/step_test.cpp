// Steps that are begun before the last one's result is known: on a GPU the usual thing, on a CPU
// the same without any gain.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/support/device.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/trainer.h"

namespace longspan::test {
namespace {

using namespace trainer;

class StepTest : public ::testing::Test {
 protected:
  StepTest() { WriteCorpus((folder_.path() / "train").string(), 19, 100, 150, 1); }

  TrainOptions Options() const {
    TrainOptions o;
    o.model = SmallModel(DType::kF32);
    o.model.mixers = {{"causal", ops::AttentionPattern::Causal()}};
    o.model.layers = {0, 0};
    o.steps = 8;
    o.context_length = 64;
    o.global_batch_tokens = 128;  // two micro-batches
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.adamw.lr = 1e-2;
    return o;
  }

  TemporaryFolder folder_;
};

// A trainer of one rank on the device of the tests.
struct OneRank {
  explicit OneRank(const TrainOptions& options)
      : ctx({.device = TestDevice(), .threads = 2, .poison_buffers = true}) {
    world.UseDevice(ctx.runtime());
    trainer = std::make_unique<Trainer>(ctx, mesh, options);
  }
  std::vector<Vec> State() {
    std::vector<Vec> state;
    for (const NamedTensor& t : trainer->State()) state.push_back(ToVec(t.tensor));
    return state;
  }
  // Puts `value` where it does harm and returns what was there.
  float Spoil(float value) {
    const Tensor norm = trainer->parameters().Find("model.norm.weight").value.Rows(0, 1);
    float before = 0;
    norm.ReadTo(&before);
    norm.WriteFrom(&value);
    return before;
  }

  Context ctx;
  parallel::SelfCommunicator world;
  parallel::DeviceMesh mesh{world, {.dp = 1, .cp = 1}};
  std::unique_ptr<Trainer> trainer;
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST_F(StepTest, BegunAheadGivesTheSameBits) {
  OneRank plain(Options()), ahead(Options());
  std::vector<StepResult> expected, results;
  for (int step = 0; step < 4; ++step) expected.push_back(plain.trainer->Step());
  PendingStep pending = ahead.trainer->BeginStep();
  for (int step = 1; step < 4; ++step) {
    PendingStep next = ahead.trainer->BeginStep();
    results.push_back(ahead.trainer->FinishStep(std::move(pending)));
    pending = std::move(next);
  }
  results.push_back(ahead.trainer->FinishStep(std::move(pending)));
  ASSERT_EQ(results.size(), expected.size());
  for (size_t i = 0; i < results.size(); ++i) {
    EXPECT_EQ(results[i].step, static_cast<int64_t>(i) + 1);
    EXPECT_EQ(results[i].loss, expected[i].loss);
    EXPECT_EQ(results[i].grad_norm, expected[i].grad_norm);
    EXPECT_EQ(results[i].tokens, 128);
    EXPECT_GT(results[i].valid_tokens, 0);
    EXPECT_EQ(results[i].valid_tokens, expected[i].valid_tokens);
    EXPECT_EQ(results[i].flops, expected[i].flops);
    EXPECT_GT(results[i].seconds, 0);
  }
  EXPECT_LT(results.back().loss, results.front().loss);
  EXPECT_EQ(ahead.State(), plain.State());
}

TEST_F(StepTest, NothingChangesAfterAStepThatStopsTheRun) {
  OneRank run(Options());
  run.trainer->Step();
  const std::vector<Vec> before = run.State();
  const float healthy = run.Spoil(kNan);
  PendingStep bad = run.trainer->BeginStep();
  run.Spoil(healthy);
  PendingStep later = run.trainer->BeginStep();
  try {
    run.trainer->FinishStep(std::move(bad));
    ADD_FAILURE() << "a step that is not finite passed";
  } catch (const StepFailure& e) {
    EXPECT_NE(std::string(e.what()).find("step 2: the loss is nan"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("the weights were not changed"), std::string::npos);
  }
  const StepResult after = run.trainer->FinishStep(std::move(later));
  EXPECT_TRUE(std::isfinite(after.loss));
  EXPECT_EQ(run.State(), before);
}

TEST_F(StepTest, SkippedStepsChangeNothingAndTooManyStopTheRun) {
  TrainOptions o = Options();
  o.on_nonfinite = NonFinitePolicy::kSkip;
  o.max_skipped_steps = 1;
  OneRank run(o);
  run.trainer->Step();
  const std::vector<Vec> before = run.State();
  const float healthy = run.Spoil(kNan);
  EXPECT_TRUE(run.trainer->Step().skipped);
  run.Spoil(healthy);
  EXPECT_EQ(run.State(), before);
  EXPECT_FALSE(run.trainer->Step().skipped);
  const std::vector<Vec> moved = run.State();
  EXPECT_NE(moved, before);

  const float latest = run.Spoil(kNan);
  PendingStep bad = run.trainer->BeginStep();
  run.Spoil(latest);
  PendingStep later = run.trainer->BeginStep();
  EXPECT_THROW(run.trainer->FinishStep(std::move(bad)), StepFailure);
  run.trainer->FinishStep(std::move(later));
  EXPECT_EQ(run.State(), moved);
}

TEST_F(StepTest, ClippingScalesTheWholeGradient) {
  // Below eps the update is proportional to the gradient, so clipping shows in the weights.
  TrainOptions free = Options();
  free.adamw.eps = 1e6;
  free.adamw.lr = 1e3;
  free.adamw.weight_decay = 0;
  free.clip_norm = 0;
  TrainOptions clipped = free;
  clipped.clip_norm = 0.01;
  OneRank a(free), b(clipped);
  const std::vector<Vec> start = a.State();
  const StepResult whole = a.trainer->Step(), limited = b.trainer->Step();
  EXPECT_EQ(whole.grad_norm, limited.grad_norm);  // reported before clipping
  ASSERT_GT(whole.grad_norm, 0.1);
  const double factor = 0.01 / whole.grad_norm;
  const std::vector<Vec> far = a.State(), near = b.State();
  bool moved = false;
  for (size_t t = 0; t < start.size(); ++t) {
    if (!a.trainer->State()[t].name.starts_with("weights/")) continue;
    Vec difference(far[t].size()), expected(far[t].size());
    for (size_t i = 0; i < difference.size(); ++i) {
      difference[i] = near[t][i] - start[t][i];
      expected[i] = factor * (far[t][i] - start[t][i]);
      moved = moved || expected[i] != 0;
      EXPECT_NEAR(difference[i], expected[i], 1e-6);
    }
  }
  EXPECT_TRUE(moved);
}

TEST_F(StepTest, NotesOfAllRanksComeBackInTheirOrder) {
  parallel::RunLocal(3, [&](parallel::Communicator& world) {
    Context ctx({.device = TestDevice(), .threads = 1});
    world.UseDevice(ctx.runtime());
    parallel::DeviceMesh mesh(world, {.dp = 1, .cp = 3});
    TrainOptions o = Options();
    o.cp = 3;
    o.placement = parallel::PlacementKind::kContiguous;
    o.context_length = 192;
    o.global_batch_tokens = 192;
    Trainer trainer(ctx, mesh, o);
    const double rank = world.rank();
    for (int step = 0; step < 3; ++step) {
      const StepResult r = trainer.Step([&] {
        const bool wish = step == 1 && world.rank() == 2;
        return RankNote{wish ? StopWish::kSignal : StopWish::kNone, {rank, step + 10 * rank}};
      });
      EXPECT_EQ(r.notes, (std::vector<double>{0, 0. + step, 1, 10. + step, 2, 20. + step}));
      EXPECT_EQ(r.stop_requested, step == 1);
      EXPECT_FALSE(r.time_is_up);
      EXPECT_EQ(r.tokens, 192);
    }
    const StepResult last = trainer.Step([&] {
      return RankNote{world.rank() == 0 ? StopWish::kTimeUp : StopWish::kNone, {0, 0}};
    });
    EXPECT_TRUE(last.stop_requested);
    EXPECT_TRUE(last.time_is_up);
  });
}

}  // namespace
}  // namespace longspan::test
