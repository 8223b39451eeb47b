#include "ops/optim/global_norm.h"

#include <cmath>
#include <limits>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

TEST(GlobalNormTest, SumsSquaresInF64) {
  for (const DType dtype : kFloatDtypes) {
    for (const int64_t n : {0, 1, 15, 17, 40000, 70001}) {
      Context ctx = OpContext();
      const Vec x = Normal(n, 1, dtype);
      const double expected = Dot(x, x);
      EXPECT_NEAR(ops::SumOfSquares(ctx, FromVec(ctx, {n}, dtype, x)), expected, 1e-12 * expected);
    }
  }
}

TEST(GlobalNormTest, HugeAndTinyGradientsSurvive) {
  Context ctx = OpContext();
  EXPECT_NEAR(ops::SumOfSquares(ctx, FromVec(ctx, {2}, DType::kF32, {3e38, 1})) / 9e76, 1, 1e-6);
  EXPECT_NEAR(ops::SumOfSquares(ctx, FromVec(ctx, {1}, DType::kF32, {1e-30})) / 1e-60, 1, 1e-6);
}

TEST(GlobalNormTest, SameBitsForAnyThreads) {
  ExpectSameBitsForAnyThreads([](Context& ctx) -> std::vector<Tensor> {
    const Tensor x = FromVec(ctx, {200003}, DType::kF32, Normal(200003, 1));
    return {FromVec(ctx, {1}, DType::kF64, {ops::SumOfSquares(ctx, x)})};
  });
}

TEST(GlobalNormTest, OneBadElementIsFoundAnywhere) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const DType dtype : kFloatDtypes) {
    Context ctx = OpContext();
    for (const size_t at : {size_t{0}, size_t{16}, size_t{40000}, size_t{40002}}) {
      for (const double bad : {inf, -inf, std::numeric_limits<double>::quiet_NaN()}) {
        Vec x = Normal(40003, 1, dtype);
        EXPECT_TRUE(ops::AllFinite(ctx, FromVec(ctx, {40003}, dtype, x)));
        x[at] = bad;
        const Tensor t = FromVec(ctx, {40003}, dtype, x);
        EXPECT_FALSE(ops::AllFinite(ctx, t));
        EXPECT_FALSE(std::isfinite(ops::SumOfSquares(ctx, t)));
      }
    }
    EXPECT_TRUE(ops::AllFinite(ctx, ctx.Empty({0}, dtype)));
  }
}

}  // namespace
}  // namespace longspan::test
