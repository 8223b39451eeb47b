// Exchanges of heads in the precisions that training uses, on the device of the tests.
#include <gtest/gtest.h>

#include "tests/parallel/context/strategy_cases.h"
#include "tests/support/device.h"

namespace longspan::test {
namespace {

using namespace parallel;

// Dense and sparse heads, kv heads on one rank and on several.
TEST(UlyssesDeviceTest, LowPrecisionIsAsNearToF64AsOneRank) {
  const std::pair<StrategyOptions, int> splits[] = {
      {{.kind = StrategyKind::kUlysses}, 3},
      {{.kind = StrategyKind::kUlysses, .head_groups = 1}, 8},
      {{.kind = StrategyKind::kHybrid, .ulysses_ranks = 2}, 4},
      {{.kind = StrategyKind::kHybrid, .ulysses_ranks = 2, .outer = StrategyKind::kExchange}, 4}};
  for (const auto& [heads, kv_heads] : {std::pair{4, 2}, {6, 1}}) {
    ops::S2Options s2{.block_size = 64, .local_blocks = 1, .stride_blocks = 3};
    s2.dense_heads = kv_heads - 1;
    s2.allow_incomplete_coverage = true;
    StrategyCase c{"s2", ops::AttentionPattern::S2(s2), {{10, 70, 200, 256}}, 256};
    c.heads = heads, c.kv_heads = kv_heads;
    const Tensors in = Inputs(c, DType::kBF16);
    const Outcome exact = RunCase(c, in);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      StrategyCase whole = c;
      whole.dtype = dtype, whole.device = TestDevice();
      const Outcome one = RunCase(whole, in);
      for (const auto& [options, ranks] : splits) {
        StrategyCase parts = whole;
        parts.placement = PlacementKind::kZigzag, parts.strategy = options, parts.ranks = ranks;
        SCOPED_TRACE(Str(ToString(dtype), " ", parts.Describe()));
        const Outcome got = RunCase(parts, in);
        for (const auto& [output, vec] : kOutputs) {
          // Gradients of shared kv heads travel in f32, and whole ones are rounded once.
          EXPECT_LT(RelRms(got.*vec, exact.*vec), 1.1 * RelRms(one.*vec, exact.*vec) + 1e-6)
              << output;
        }
      }
    }
  }
}

}  // namespace
}  // namespace longspan::test
