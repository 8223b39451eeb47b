// Strategies in the precisions that training uses, on the device of the tests: as near to f64 on
// one rank (on a CPU) as one rank is.
#include <gtest/gtest.h>

#include <functional>
#include <utility>

#include "parallel/context/strategy.h"
#include "tests/parallel/context/strategy_cases.h"
#include "tests/support/device.h"

namespace longspan::test {
namespace {

using namespace parallel;

// Calls check(f64 on one rank, the dtype on one rank, the dtype on `ranks` ranks) for 2 to 4 ranks
// in all strategies; every pattern on a CPU, one for each number of ranks on a GPU, which may be an
// emulated one. Placements and the budget for kept keys in turn.
void RunLowPrecision(
    DType dtype, const std::function<void(const Outcome&, const Outcome&, const Outcome&)>& check,
    const ops::AttentionOptions& options = {}) {
  constexpr PlacementKind kPlacements[] = {PlacementKind::kContiguous, PlacementKind::kZigzag,
                                           PlacementKind::kStriped, PlacementKind::kBalanced};
  int turn = 0;
  for (const auto& [ranks, gpu_pattern] : {std::pair{2, "window"}, {3, "s2_wide"}, {4, "causal"}}) {
    const int64_t length = 128 * ranks;
    std::vector<std::vector<int64_t>> ends = {{10, 70, 71, 200, length}};
    if (!OnCuda()) ends.push_back({length});
    for (const auto& [name, pattern] : Patterns()) {
      if (OnCuda() && name != gpu_pattern) continue;
      StrategyCase c{name, pattern, ends, length};
      c.options = options;
      const Tensors in = Inputs(c, DType::kBF16);
      const Outcome exact = RunCase(c, in);
      c.dtype = dtype, c.device = TestDevice();
      const Outcome one = RunCase(c, in);
      c.ranks = ranks;
      for (const StrategyKind kind :
           {StrategyKind::kRing, StrategyKind::kDoubleRing, StrategyKind::kAllGather,
            StrategyKind::kExchange, StrategyKind::kUlysses, StrategyKind::kHybrid}) {
        c.placement = kPlacements[turn % 4];
        c.strategy = StrategyOf(kind);
        c.strategy.ranks_per_node = ranks % 2 == 0 ? 2 : 0;
        c.strategy.keep_rows = turn % 3 == 0 ? length * c.kv_heads : 0;
        ++turn;
        SCOPED_TRACE(c.Describe());
        check(exact, one, RunCase(c, in));
      }
    }
  }
}

void ExpectNear(const Outcome& exact, const Outcome& one, const Outcome& got) {
  for (const auto& [output, vec] : kOutputs) {
    EXPECT_LT(Difference(got.*vec, exact.*vec), 1e-5) << output;
    EXPECT_LT(Difference(got.*vec, one.*vec), 1e-5) << output;
  }
}
// Partial results travel and merge in f32, so nothing is rounded to bf16 twice.
void ExpectAsNear(const Outcome& exact, const Outcome& one, const Outcome& got) {
  for (const auto& [output, vec] : kOutputs) {
    EXPECT_LT(RelRms(got.*vec, exact.*vec), 1.1 * RelRms(one.*vec, exact.*vec) + 1e-6) << output;
  }
}

TEST(StrategyPrecisionTest, SinglePrecisionFollowsF64) { RunLowPrecision(DType::kF32, ExpectNear); }
TEST(StrategyPrecisionTest, Bf16IsAsNearToF64AsOneRank) {
  RunLowPrecision(DType::kBF16, ExpectAsNear);
}
TEST(StrategyPrecisionTest, SigmoidInSinglePrecisionFollowsF64) {
  RunLowPrecision(DType::kF32, ExpectNear, Sigmoid());
}
TEST(StrategyPrecisionTest, SigmoidInBf16IsAsNearToF64AsOneRank) {
  RunLowPrecision(DType::kBF16, ExpectAsNear, Sigmoid());
}

}  // namespace
}  // namespace longspan::test
