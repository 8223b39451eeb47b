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
// in both strategies and placements; every pattern on a CPU, one for each number of ranks on a GPU,
// which may be an emulated one.
void RunLowPrecision(
    DType dtype, const std::function<void(const Outcome&, const Outcome&, const Outcome&)>& check,
    const ops::AttentionOptions& options = {}) {
  const auto patterns = Patterns();
  // On a GPU: a window, S2 with blocks of two mask blocks, causal.
  for (const auto& [ranks, gpu_pattern] : {std::pair{2, 2}, {3, 4}, {4, 0}}) {
    const int64_t length = 128 * ranks;
    std::vector<std::vector<int64_t>> ends = {{10, 70, 71, 200, length}};
    if (!OnCuda()) ends.push_back({length});
    const Tensors in = Inputs(static_cast<int64_t>(ends.size()) * length, DType::kBF16);
    for (size_t i = 0; i < (OnCuda() ? 1 : patterns.size()); ++i) {
      const auto& [name, pattern] = patterns[OnCuda() ? static_cast<size_t>(gpu_pattern) : i];
      StrategyCase c{name, pattern, ends, length, PlacementKind::kContiguous, StrategyKind::kRing,
                     1};
      c.options = options;
      const Outcome exact = RunCase(c, in);
      c.dtype = dtype, c.device = TestDevice();
      const Outcome one = RunCase(c, in);
      c.ranks = ranks;
      for (PlacementKind placement : {PlacementKind::kContiguous, PlacementKind::kZigzag}) {
        for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
          c.placement = placement, c.strategy = strategy;
          SCOPED_TRACE(Str(name, " ", ToString(placement), " ", ToString(strategy), " on ", ranks));
          check(exact, one, RunCase(c, in));
        }
      }
    }
  }
}

void ExpectNear(const Outcome& exact, const Outcome& one, const Outcome& got) {
  for (const auto& [output, vec] : kOutputs) {
    EXPECT_LT(RelMax(got.*vec, exact.*vec), 1e-5) << output;
    EXPECT_LT(RelMax(got.*vec, one.*vec), 1e-5) << output;
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
