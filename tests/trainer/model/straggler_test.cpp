#include "trainer/straggler.h"

#include <gtest/gtest.h>

#include "ops/core/error.h"

namespace longspan::trainer {
namespace {

using Found = std::vector<Straggler>;

// The stragglers after each of `steps` equal steps, all together.
Found After(StragglerWatch& watch, const std::vector<double>& own_s, int steps) {
  Found all;
  for (int i = 0; i < steps; ++i) {
    for (const Straggler& s : watch.Step(own_s)) all.push_back(s);
  }
  return all;
}

TEST(StragglerTest, ARankIsNamedOnceAfterSeveralSlowSteps) {
  StragglerWatch watch;
  EXPECT_TRUE(After(watch, {1, 1.2, 5, 0.9}, StragglerWatch::kSteps - 1).empty());
  const Found found = watch.Step(std::vector<double>{1, 1.2, 5, 0.9});
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].rank, 2);
  EXPECT_EQ(found[0].own_s, 5);
  EXPECT_EQ(found[0].others_s, 1);
  EXPECT_TRUE(After(watch, {1, 1.2, 5, 0.9}, 50).empty()) << "it has been named";
  // One good step, and it may be named again.
  EXPECT_TRUE(After(watch, {1, 1, 1, 1}, 1).empty());
  EXPECT_EQ(After(watch, {1, 1.2, 5, 0.9}, StragglerWatch::kSteps).size(), 1u);
}

TEST(StragglerTest, SingleSlowStepsAreNothing) {
  StragglerWatch watch;
  for (int i = 0; i < 30; ++i) {
    EXPECT_TRUE(After(watch, {1, 9, 1}, StragglerWatch::kSteps - 1).empty());
    EXPECT_TRUE(After(watch, {1, 2.9, 1}, 1).empty());
  }
}

// Of two ranks each is compared with the other: the median of both could never be exceeded so far.
TEST(StragglerTest, OneOfTwoRanks) {
  StragglerWatch watch;
  const Found found = After(watch, {0.5, 0.1}, StragglerWatch::kSteps);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].rank, 0);
  EXPECT_EQ(found[0].others_s, 0.1);
}

TEST(StragglerTest, TheMedianIsThatOfTheOthers) {
  StragglerWatch watch;
  // Of the others of rank 4: 1 1 2 4, median 1.5; of rank 3: 1 1 2 10, the same.
  const Found found = After(watch, {1, 1, 2, 4, 10}, StragglerWatch::kSteps);
  EXPECT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].rank, 4);
  EXPECT_DOUBLE_EQ(found[0].others_s, 1.5);
  StragglerWatch two;  // two slow ranks of five
  EXPECT_EQ(After(two, {8, 1, 1, 9, 1}, StragglerWatch::kSteps).size(), 2u);
  StragglerWatch equal;  // three of five are the rule, not the exception
  EXPECT_TRUE(After(equal, {8, 1, 8, 8, 1}, StragglerWatch::kSteps).empty());
}

TEST(StragglerTest, ShortTimesUnknownTimesAndSingleRanksAreNothing) {
  StragglerWatch short_times;
  EXPECT_TRUE(After(short_times, {0.001, 0.1005}, 20).empty());
  EXPECT_EQ(After(short_times, {0.001, 0.1015}, 20).size(), 1u);
  StragglerWatch unknown;
  EXPECT_TRUE(After(unknown, {-1, 5}, 20).empty());
  EXPECT_TRUE(After(unknown, {-1, -1}, 20).empty());
  // A step that was not measured neither counts nor interrupts.
  EXPECT_TRUE(After(unknown, {1, 5}, StragglerWatch::kSteps - 1).empty());
  EXPECT_TRUE(After(unknown, {-1, -1}, 15).empty());
  EXPECT_EQ(After(unknown, {1, 5}, 1).size(), 1u);
  StragglerWatch alone;
  EXPECT_TRUE(After(alone, {100}, 20).empty());
  EXPECT_THROW(alone.Step(std::vector<double>{1, 2}), InvalidArgument);
}

}  // namespace
}  // namespace longspan::trainer
