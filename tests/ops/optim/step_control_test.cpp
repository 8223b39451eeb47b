#include "ops/optim/step_control.h"

#include <cmath>
#include <limits>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Sums {
  double loss, z, valid, squares;
};

class Steps {
 public:
  explicit Steps(ops::StepControlOptions options, double skips = 0)
      : options_(options), ctx_(OpContext()), record_(ops::MakeStepRecord(ctx_, skips)) {}
  Vec Step(const Sums& s) {
    ops::StepControl(ctx_, FromVec(ctx_, {3}, DType::kF64, {s.loss, s.z, s.valid}),
                     FromVec(ctx_, {1}, DType::kF64, {s.squares}), options_, record_);
    return ToVec(record_);
  }

 private:
  const ops::StepControlOptions options_;
  Context ctx_;
  Tensor record_;
};

constexpr Sums kHealthy{12, 0.5, 4, 64};  // loss 3, norm 8 / 4 = 2

TEST(StepControlTest, DividesByValidTokensAndClips) {
  const Vec free = Steps({}).Step(kHealthy);
  EXPECT_EQ(free[ops::kStepLoss], 3);
  EXPECT_EQ(free[ops::kStepGradNorm], 2);
  EXPECT_EQ(free[ops::kStepGradScale], 0.25);
  EXPECT_EQ(free[ops::kStepApply], 1);
  EXPECT_EQ(free[ops::kStepFinite], 1);
  EXPECT_EQ(free[ops::kStepSkips], 0);
  EXPECT_EQ(Steps({.clip_norm = 2}).Step(kHealthy)[ops::kStepGradScale], 0.25);  // at the limit
  const Vec clipped = Steps({.clip_norm = 0.5}).Step(kHealthy);
  EXPECT_EQ(clipped[ops::kStepGradScale], 0.0625);
  EXPECT_EQ(clipped[ops::kStepGradNorm], 2);
  EXPECT_EQ(Steps({.clip_norm = 0.5}).Step({12, 0, 4, 0})[ops::kStepGradScale], 0.25);
}

TEST(StepControlTest, WithoutLabelsNothingIsAppliedAndNothingIsWrong) {
  Steps run({.clip_norm = 1});
  const Vec none = run.Step({0, 0, 0, 0});
  EXPECT_EQ(none[ops::kStepApply], 0);
  EXPECT_EQ(none[ops::kStepFinite], 1);
  EXPECT_EQ(none[ops::kStepLoss], 0);
  EXPECT_EQ(none[ops::kStepSkips], 0);
  EXPECT_EQ(run.Step(kHealthy)[ops::kStepApply], 1);
}

TEST(StepControlTest, OneStepThatIsNotFiniteStopsAllThatFollow) {
  for (const double bad : {kNan, kInfinity, -kInfinity}) {
    for (const Sums& s : {Sums{bad, 0, 4, 64}, {12, bad, 4, 64}, {12, 0, 4, bad}}) {
      Steps run({.clip_norm = 1});
      EXPECT_EQ(run.Step(kHealthy)[ops::kStepApply], 1);
      const Vec failed = run.Step(s);
      EXPECT_EQ(failed[ops::kStepApply], 0);
      EXPECT_EQ(failed[ops::kStepFinite], 0);
      EXPECT_EQ(failed[ops::kStepStopped], 1);
      for (int later = 0; later < 3; ++later) {
        const Vec after = run.Step(kHealthy);
        EXPECT_EQ(after[ops::kStepApply], 0);
        EXPECT_EQ(after[ops::kStepFinite], 1);
        EXPECT_EQ(after[ops::kStepLoss], 3);
      }
    }
  }
}

TEST(StepControlTest, SkipsUpToTheAllowance) {
  Steps run({.skips_allowed = 3}, /*skips=*/1);  // one before the run was resumed
  const Sums bad{kNan, 0, 4, 64};
  for (const double skips : {2, 3}) {
    const Vec skipped = run.Step(bad);
    EXPECT_EQ(skipped[ops::kStepApply], 0);
    EXPECT_EQ(skipped[ops::kStepSkips], skips);
    EXPECT_EQ(skipped[ops::kStepStopped], 0);
    EXPECT_EQ(run.Step(kHealthy)[ops::kStepApply], 1);
  }
  EXPECT_EQ(run.Step(bad)[ops::kStepStopped], 1);
  EXPECT_EQ(run.Step(kHealthy)[ops::kStepApply], 0);
}

// A run that was allowed to skip may be resumed under a stricter policy.
TEST(StepControlTest, EarlierSkipsAloneDoNotStop) {
  Steps run({.skips_allowed = 0}, /*skips=*/5);
  EXPECT_EQ(run.Step(kHealthy)[ops::kStepApply], 1);
  EXPECT_EQ(run.Step({kNan, 0, 4, 64})[ops::kStepStopped], 1);
}

TEST(StepControlTest, RefusesWhatDoesNotFit) {
  Context ctx = OpContext();
  const Tensor sums = ctx.Zeros({3}, DType::kF64), squares = ctx.Zeros({1}, DType::kF64);
  Tensor record = ops::MakeStepRecord(ctx), two = ctx.Zeros({2}, DType::kF64);
  EXPECT_THROW(ops::StepControl(ctx, two, squares, {}, record), InvalidArgument);
  EXPECT_THROW(ops::StepControl(ctx, sums, two, {}, record), InvalidArgument);
  EXPECT_THROW(ops::StepControl(ctx, sums, squares, {}, two), InvalidArgument);
  EXPECT_THROW(ops::StepControl(ctx, sums, squares, {.clip_norm = -1}, record), InvalidArgument);
  EXPECT_THROW(ops::StepControl(ctx, sums, squares, {.skips_allowed = kNan}, record),
               InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
