// Which ranks are called slow, and that a step knows its waits, by which it is decided.
#include "trainer/straggler.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "ops/core/error.h"
#include "parallel/comm/faulty.h"
#include "parallel/comm/local.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/trainer.h"

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

struct Layout {
  int dp, cp, stage;
  int64_t group, micro_batches;
};

// Seconds of two steps of rank 0, and what of them it did not wait.
struct Steps {
  double total_s = 0, own_s = 0;
};

// Rank 1 sleeps so long before each of its operations.
Steps TrainWithDelay(TrainOptions o, const Layout& layout, double delay_s) {
  o.dp = layout.dp;
  o.cp = layout.cp;
  o.zero_stage = layout.stage;
  o.hybrid_shard = layout.group;
  o.global_batch_tokens = o.dp * layout.micro_batches * o.context_length;
  Steps steps;
  parallel::RunLocal(layout.dp * layout.cp, [&](parallel::Communicator& inner) {
    parallel::FaultyCommunicator world(
        inner, {{.kind = parallel::Fault::Kind::kDelay, .rank = 1, .seconds = delay_s}});
    parallel::DeviceMesh mesh(world, {.dp = layout.dp, .cp = layout.cp});
    Context ctx({.threads = 1});
    Trainer trainer(ctx, mesh, o);
    trainer.Step();
    ctx.trace().Reset();
    double total = 0;
    for (int i = 0; i < 2; ++i) total += trainer.Step().seconds;
    if (world.rank() != 0) return;
    steps = {total, total};
    for (const auto& [category, seconds] : ctx.trace().Totals()) {
      for (const char* wait :
           {"communication wait", "gradient reduction wait", "parameter gather wait"}) {
        if (category == wait) steps.own_s -= seconds;
      }
    }
  });
  return steps;
}

// Whatever rank 0 waits for must be called a wait, or it would seem to compute as long as rank 1.
TEST(WaitsTest, ARankThatWaitsDoesNotSeemToCompute) {
  test::TemporaryFolder folder;
  test::WriteCorpus((folder.path() / "train").string(), 19, 100, 100, 1);
  TrainOptions o;
  o.model = test::SmallModel(DType::kF32);
  o.steps = 3;
  o.context_length = 256;
  o.train = {{(folder.path() / "train").string(), 1}};
  o.adamw.lr = 1e-3;
  for (const Layout& layout : {Layout{2, 1, 0, 0, 1},
                               {2, 1, 1, 0, 1},
                               {2, 1, 2, 0, 2},
                               {2, 1, 3, 0, 2},
                               {4, 1, 2, 2, 1},
                               {1, 2, 0, 0, 4},
                               {1, 2, 3, 0, 2}}) {
    SCOPED_TRACE(Str("dp ", layout.dp, " cp ", layout.cp, " stage ", layout.stage, " groups of ",
                     layout.group));
    // On a busy machine a measurement may be wrong, but not each time.
    std::string seen;
    bool called_waits = false;
    for (int attempt = 0; attempt < 4 && !called_waits; ++attempt) {
      const Steps plain = TrainWithDelay(o, layout, 0);
      // As long as makes what a slow processor takes small beside it.
      const Steps slow = TrainWithDelay(o, layout, std::clamp(plain.own_s / 4, 0.01, 0.05));
      called_waits = slow.own_s - plain.own_s < 0.1 * (slow.total_s - plain.total_s);
      seen += Str(slow.own_s, " of ", slow.total_s, " s instead of ", plain.own_s, " of ",
                  plain.total_s, " s; ");
    }
    EXPECT_TRUE(called_waits) << seen;
  }
}

}  // namespace
}  // namespace longspan::trainer
