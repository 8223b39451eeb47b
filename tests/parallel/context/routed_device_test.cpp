// Routed attention over ranks in the precisions that training uses, on the device of the tests.
#include <gtest/gtest.h>

#include "tests/ops/op_test.h"
#include "tests/parallel/context/routed_cases.h"

namespace longspan::test {
namespace {

using namespace parallel;

// Against the definition in f64 with the blocks that the ranks chose, which may rank gates that
// differ by rounding otherwise.
TEST(RoutedDeviceTest, EqualsTheDefinition) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const auto& [placement, ranks] : {std::pair{PlacementKind::kStriped, 2},
                                           {PlacementKind::kZigzag, 3},
                                           {PlacementKind::kContiguous, 4}}) {
      RoutedCase c;
      c.moba.problem = {.documents = std::make_shared<const ops::Documents>(
                            ops::Documents::FromEnds(400, {{70, 400}})),
                        .block_size = 128,
                        .top_k = 3,
                        .heads = 4,
                        .kv_heads = 2,
                        .dim = 16,
                        .scale = 0.3};
      c.moba.dtype = dtype;
      c.device = TestDevice();
      c.placement = placement;
      c.ranks = ranks;
      c.keep_rows = ranks == 3 ? 0 : int64_t{1} << 40;
      SCOPED_TRACE(c.Name());
      const MobaInputs in = MakeMobaInputs(c.moba);
      const RoutedOutcome got = RunRouted(c, in);
      const MobaProblem& p = c.moba.problem;
      const MobaChoice choice = ChoiceOf(c.moba, got.selected);
      const MobaOutput out = MobaOracleForward(p, choice, in.q, in.k, in.v);
      const MobaOracleGradients grads = MobaOracleBackward(p, choice, in.q, in.k, in.v, in.d_out);
      // Results in bf16 are rounded once; kernels may have operands in bf16.
      const double tolerance = dtype == DType::kBF16 ? 1e-2 : 5e-6;
      EXPECT_LT(RelRms(got.o, out.o), tolerance);
      EXPECT_LT(RelMax(got.lse, out.lse), tolerance);
      EXPECT_LT(RelRms(got.dq, grads.dq), tolerance);
      EXPECT_LT(RelRms(got.dk, grads.dk), tolerance);
      EXPECT_LT(RelRms(got.dv, grads.dv), tolerance);
    }
  }
}

}  // namespace
}  // namespace longspan::test
