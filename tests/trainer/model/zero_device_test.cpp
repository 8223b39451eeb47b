// Sharded state in low precision: the same bits as whole state has, on a CPU and on a GPU.
#include <gtest/gtest.h>

#include "tests/trainer/model/duo_support.h"
#include "tests/trainer/model/zero_support.h"

namespace longspan::test {
namespace {

using namespace trainer;

class ZeroDeviceTest : public ::testing::Test {
 protected:
  ZeroDeviceTest() { WriteCorpus((folder_.path() / "train").string(), 19, 200, 100, 1); }

  // Without clipping nothing depends on the order in which the norm is added up.
  TrainOptions Options(DType dtype, int64_t rows) const {
    TrainOptions o;
    o.model = SmallModel(dtype);
    o.steps = 2;
    o.context_length = 64;
    o.global_batch_tokens = rows * 64;
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.adamw.lr = 1e-2;
    o.clip_norm = 0;
    return o;
  }

  TemporaryFolder folder_;
};

// A sum over ranks has the same bits whoever receives it, and the optimizer works element by
// element. Stages 2 and 3 add sums of micro-batches, stage 0 sums what micro-batches added up to.
TEST_F(ZeroDeviceTest, ShardedRunsHaveTheBitsOfWholeOnes) {
  for (const auto& [dtype, rows] :
       {std::pair<DType, int64_t>{DType::kF32, 4}, {DType::kF32, 2}, {DType::kBF16, 2}}) {
    const TrainOptions o = Options(dtype, rows);
    const ZeroRun whole = RunZero(o, {2, 1, 0});
    for (const int stage : {1, 2, 3}) {
      SCOPED_TRACE(Str(ToString(dtype), " rows ", rows, " stage ", stage));
      const ZeroRun run = RunZero(o, {2, 1, stage});
      if (stage == 1 || rows == 2) {
        EXPECT_EQ(run.losses, whole.losses);
        EXPECT_EQ(run.state, whole.state);
      } else {
        EXPECT_LT(RelMax(run.losses, whole.losses), 1e-5);
      }
    }
  }
}

TEST_F(ZeroDeviceTest, GroupsAndContextRanks) {
  const TrainOptions o = Options(DType::kF32, 4);
  const ZeroRun whole = RunZero(o, {2, 1, 0});
  TrainOptions cp = o;
  cp.context_length = 128;
  cp.placement = parallel::PlacementKind::kContiguous;
  const ZeroRun one = RunZero(cp, {1, 1, 0});
  EXPECT_LT(RelMax(RunZero(cp, {1, 2, 3}).losses, one.losses), 1e-5);
  for (const int stage : {1, 3}) {
    EXPECT_LT(RelMax(RunZero(o, {4, 1, stage, 2}).losses, whole.losses), 1e-5);
  }
}

TEST_F(ZeroDeviceTest, GatesOfAFrozenModel) {
  TrainOptions o = Options(DType::kBF16, 2);
  o.model = GatedModel(DType::kBF16, 3, 20);
  o.objective = DuoObjective(0.05);
  const ZeroRun whole = RunZero(o, {2, 1, 0});
  for (const int stage : {1, 2, 3}) {
    SCOPED_TRACE(stage);
    const ZeroRun run = RunZero(o, {2, 1, stage});
    EXPECT_EQ(run.losses, whole.losses);
    EXPECT_EQ(run.state, whole.state);
  }
}

// The moments in host memory: the same numbers, and nothing of them on the GPU.
TEST_F(ZeroDeviceTest, OffloadedMoments) {
  TrainOptions o = Options(DType::kBF16, 2);
  o.offload_optimizer = true;
  if (!OnCuda()) {
    EXPECT_THROW(RunZero(o, {1, 1, 0}), InvalidArgument);
    return;
  }
  for (const int stage : {0, 3}) {
    SCOPED_TRACE(stage);
    o.offload_optimizer = false;
    const ZeroRun expected = RunZero(o, {2, 1, stage});
    o.offload_optimizer = true;
    const ZeroRun run = RunZero(o, {2, 1, stage});
    EXPECT_EQ(run.losses, expected.losses);
    EXPECT_EQ(run.state, expected.state);
  }
  Context ctx({.device = TestDevice(), .threads = 1});
  const ParameterStore store(ctx, o.model, StoreOptions{.offload_optimizer = true});
  EXPECT_EQ(ctx.allocator().peak_by_category()[static_cast<size_t>(MemoryCategory::kOptimizer)],
            0u);
}

}  // namespace
}  // namespace longspan::test
