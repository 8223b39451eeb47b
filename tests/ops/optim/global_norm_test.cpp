#include "ops/optim/global_norm.h"

#include <cmath>
#include <limits>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

double SumOfSquares(Context& ctx, const Tensor& t) {
  Tensor total = ctx.Zeros({1}, DType::kF64);
  ops::AddSumOfSquares(ctx, t, total);
  return ToVec(total)[0];
}

double NotFinite(Context& ctx, const Tensor& t) {
  Tensor total = ctx.Zeros({1}, DType::kF64);
  ops::AddNotFinite(ctx, t, total);
  return ToVec(total)[0];
}

TEST(GlobalNormTest, SumsSquaresInF64) {
  for (const DType dtype : FloatDtypes()) {
    for (const int64_t n : {0, 1, 15, 17, 40000, 70001}) {
      for (const MakeTensor make : kAlignments) {
        Context ctx = OpContext();
        const Vec x = Normal(n, 1, dtype);
        const double expected = Dot(x, x);
        EXPECT_NEAR(SumOfSquares(ctx, make(ctx, {n}, dtype, x)), expected, 1e-12 * expected);
      }
    }
  }
}

// More runs than one block of the second stage has threads, with a short last one.
TEST(GlobalNormTest, ManyRuns) {
  constexpr int64_t kMany = 8192 * 300 + 77;
  Context ctx = OpContext();
  Vec x(kMany);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(i % 13) - 6;
  const Tensor t = FromVec(ctx, {kMany}, DType::kBF16, x);
  EXPECT_EQ(SumOfSquares(ctx, t), Dot(x, x));  // integers: exact in any order
}

TEST(GlobalNormTest, AddsToTheTotal) {
  Context ctx = OpContext();
  Tensor total = FromVec(ctx, {1}, DType::kF64, {5});
  const Tensor x = FromVec(ctx, {2}, DType::kF32, {3, 4});
  ops::AddSumOfSquares(ctx, x, total);
  ops::AddSumOfSquares(ctx, x, total);
  EXPECT_EQ(ToVec(total), Vec{55});
  Tensor narrow = ctx.Zeros({1}, DType::kF32), two = ctx.Zeros({2}, DType::kF64);
  EXPECT_THROW(ops::AddSumOfSquares(ctx, x, narrow), InvalidArgument);
  EXPECT_THROW(ops::AddSumOfSquares(ctx, x, two), InvalidArgument);
  EXPECT_THROW(ops::AddNotFinite(ctx, x, narrow), InvalidArgument);
}

TEST(GlobalNormTest, HugeAndTinyGradientsSurvive) {
  Context ctx = OpContext();
  EXPECT_NEAR(SumOfSquares(ctx, FromVec(ctx, {2}, DType::kF32, {3e38, 1})) / 9e76, 1, 1e-6);
  EXPECT_NEAR(SumOfSquares(ctx, FromVec(ctx, {1}, DType::kF32, {1e-30})) / 1e-60, 1, 1e-6);
}

TEST(GlobalNormTest, SameBitsForAnyThreads) {
  ExpectSameBitsForAnyThreads([](Context& ctx) -> std::vector<Tensor> {
    const Tensor x = FromVec(ctx, {200003}, DType::kF32, Normal(200003, 1));
    return {FromVec(ctx, {1}, DType::kF64, {SumOfSquares(ctx, x)})};
  });
}

TEST(GlobalNormTest, OneBadElementIsFoundAnywhere) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const DType dtype : FloatDtypes()) {
    Context ctx = OpContext();
    for (const size_t at : {size_t{0}, size_t{16}, size_t{40000}, size_t{40002}}) {
      for (const double bad : {inf, -inf, std::numeric_limits<double>::quiet_NaN()}) {
        Vec x = Normal(40003, 1, dtype);
        EXPECT_EQ(NotFinite(ctx, FromVec(ctx, {40003}, dtype, x)), 0);
        x[at] = bad;
        x[5000] = bad;
        const Tensor t = FromVec(ctx, {40003}, dtype, x);
        EXPECT_EQ(NotFinite(ctx, t), 2);
        EXPECT_FALSE(std::isfinite(SumOfSquares(ctx, t)));
      }
    }
    EXPECT_EQ(NotFinite(ctx, ctx.Empty({0}, dtype)), 0);
  }
}

}  // namespace
}  // namespace longspan::test
