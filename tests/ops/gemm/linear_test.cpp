#include "ops/gemm/linear.h"

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kT = 7, kK = 33, kN = 13;

Vec Product(const Vec& x, const Vec& w) {  // y = x w^T
  Vec y(static_cast<size_t>(kT * kN));
  for (int64_t t = 0; t < kT; ++t) {
    for (int64_t n = 0; n < kN; ++n) {
      for (int64_t k = 0; k < kK; ++k) {
        y[static_cast<size_t>(t * kN + n)] +=
            x[static_cast<size_t>(t * kK + k)] * w[static_cast<size_t>(n * kK + k)];
      }
    }
  }
  return y;
}

TEST(LinearTest, MatchesReferenceAndFiniteDifferences) {
  for (const DType dtype : FloatDtypes()) {
    Context ctx = OpContext();
    Vec x = Normal(kT * kK, 1, dtype), w = Normal(kN * kK, 2, dtype);
    const Vec dy = Normal(kT * kN, 3, dtype), dw_before = Normal(kN * kK, 4);
    const Tensor tx = FromVec(ctx, {kT, kK}, dtype, x), tw = FromVec(ctx, {kN, kK}, dtype, w);
    Tensor dw = FromVec(ctx, {kN, kK}, AccumulatorOf(dtype), dw_before);
    const Tensor y = ops::LinearForward(ctx, tx, tw);
    const Tensor dx = ops::LinearBackward(ctx, FromVec(ctx, {kT, kN}, dtype, dy), tx, tw, dw, true);
    EXPECT_EQ(dx.dtype(), dtype);
    const Vec expected = Product(x, w);
    EXPECT_LE(RelRms(ToVec(y), expected), Bound(dtype, expected));
    const auto f = [&] { return Dot(Product(x, w), dy); };
    const Vec dx_expected = NumericGradient(x, f);
    EXPECT_LE(RelRms(ToVec(dx), dx_expected), std::max(1e-6, Bound(dtype, dx_expected)));
    Vec dw_expected = NumericGradient(w, f);
    for (size_t i = 0; i < dw_expected.size(); ++i) dw_expected[i] += dw_before[i];
    EXPECT_LE(RelRms(ToVec(dw), dw_expected), 1e-6);
  }
}

TEST(LinearTest, WithoutInputGradientAndWithoutTokens) {
  Context ctx = OpContext();
  const Tensor w = FromVec(ctx, {kN, kK}, DType::kF32, Normal(kN * kK, 2));
  const Vec before = Normal(kN * kK, 4);
  Tensor dw = FromVec(ctx, {kN, kK}, DType::kF32, before);
  const Tensor none = ctx.Empty({0, kK}, DType::kF32);
  EXPECT_EQ(ops::LinearForward(ctx, none, w).shape(), Shape({0, kN}));
  EXPECT_FALSE(
      ops::LinearBackward(ctx, ctx.Empty({0, kN}, DType::kF32), none, w, dw, false).defined());
  EXPECT_EQ(ToVec(dw), before);
  Tensor narrow = ctx.Zeros({kN, kK}, DType::kBF16);
  EXPECT_THROW(ops::LinearBackward(ctx, ctx.Empty({0, kN}, DType::kF32), none, w, narrow, false),
               InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
