#include "trainer/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace longspan::trainer {
namespace {

TEST(ScheduleTest, CosineRisesHoldsItsHalfWayPointAndEndsAtTheFraction) {
  const ScheduleOptions o{.kind = ScheduleKind::kCosine, .warmup_steps = 4, .final_fraction = 0.1};
  EXPECT_DOUBLE_EQ(LearningRate(o, 2.0, 0, 105), 0.5);
  EXPECT_DOUBLE_EQ(LearningRate(o, 2.0, 3, 105), 2.0);
  EXPECT_DOUBLE_EQ(LearningRate(o, 2.0, 4, 105), 2.0);
  EXPECT_NEAR(LearningRate(o, 2.0, 54, 105), 2.0 * 0.55, 1e-12);
  EXPECT_NEAR(LearningRate(o, 2.0, 104, 105), 0.2, 1e-12);
}

TEST(ScheduleTest, WsdIsFlatThenFallsAsOneMinusSqrt) {
  const ScheduleOptions o{.kind = ScheduleKind::kWsd, .warmup_steps = 0, .decay_steps = 100};
  EXPECT_DOUBLE_EQ(LearningRate(o, 1.0, 0, 501), 1.0);
  EXPECT_DOUBLE_EQ(LearningRate(o, 1.0, 400, 501), 1.0);
  EXPECT_NEAR(LearningRate(o, 1.0, 425, 501), 0.5, 1e-12);  // 1 - sqrt(1/4)
  EXPECT_NEAR(LearningRate(o, 1.0, 500, 501), 0.0, 1e-12);
  ScheduleOptions linear = o;
  linear.decay_shape = DecayShape::kLinear;
  linear.final_fraction = 0.5;
  EXPECT_NEAR(LearningRate(linear, 1.0, 450, 501), 0.75, 1e-12);
}

TEST(ScheduleTest, ConstantAfterWarmUpAndOneStepRuns) {
  const ScheduleOptions o{.kind = ScheduleKind::kConstant, .warmup_steps = 2};
  EXPECT_DOUBLE_EQ(LearningRate(o, 3.0, 0, 9), 1.5);
  EXPECT_DOUBLE_EQ(LearningRate(o, 3.0, 8, 9), 3.0);
  for (auto kind : {ScheduleKind::kCosine, ScheduleKind::kWsd, ScheduleKind::kConstant}) {
    EXPECT_TRUE(std::isfinite(LearningRate({.kind = kind, .decay_steps = 1}, 1.0, 0, 1)));
  }
}

}  // namespace
}  // namespace longspan::trainer
