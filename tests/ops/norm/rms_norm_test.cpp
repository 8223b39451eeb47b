#include "ops/norm/rms_norm.h"

#include <cmath>
#include <limits>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kT = 7, kD = 33;  // odd on purpose: divides no vector width
constexpr double kEps = 1e-2;       // large enough that forgetting it fails

Vec Reference(const Vec& x, const Vec& w) {  // y = x * w / sqrt(mean(x^2) + eps), per row
  const size_t width = w.size();
  Vec y(x.size());
  for (size_t t = 0; t < x.size() / width; ++t) {
    double square = 0;
    for (size_t d = 0; d < width; ++d) square += x[t * width + d] * x[t * width + d];
    const double rms = std::sqrt(square / static_cast<double>(width) + kEps);
    for (size_t d = 0; d < width; ++d) y[t * width + d] = x[t * width + d] * w[d] / rms;
  }
  return y;
}

void CheckAgainstReference(DType dtype, DType weight_dtype, int64_t width = kD,
                           MakeTensor make = FromVecAligned) {
  Context ctx = OpContext();
  Vec x = Normal(kT * width, 1, dtype), w = Normal(width, 2, weight_dtype);
  const Vec dy = Normal(kT * width, 3, dtype), dw_before = Normal(width, 4);
  const Tensor tx = make(ctx, {kT, width}, dtype, x), tw = make(ctx, {width}, weight_dtype, w);
  Tensor dw = make(ctx, {width}, AccumulatorOf(dtype), dw_before);
  const auto [y, rstd] = ops::RmsNormForward(ctx, tx, tw, kEps);
  const Tensor dx = ops::RmsNormBackward(ctx, make(ctx, {kT, width}, dtype, dy), tx, tw, rstd, dw);
  EXPECT_EQ(y.dtype(), dtype);
  EXPECT_EQ(rstd.dtype(), AccumulatorOf(dtype));
  const Vec expected = Reference(x, w);
  EXPECT_LE(RelRms(ToVec(y), expected), Bound(dtype, expected));
  const auto f = [&] { return Dot(Reference(x, w), dy); };
  const Vec dx_expected = NumericGradient(x, f);
  EXPECT_LE(RelRms(ToVec(dx), dx_expected), std::max(1e-6, Bound(dtype, dx_expected)));
  Vec dw_expected = NumericGradient(w, f);
  for (size_t i = 0; i < dw_expected.size(); ++i) dw_expected[i] += dw_before[i];
  EXPECT_LE(RelRms(ToVec(dw), dw_expected), 1e-6);
}

TEST(RmsNormTest, MatchesReferenceAndFiniteDifferences) {
  CheckAgainstReference(DType::kF32, DType::kF32);
  CheckAgainstReference(DType::kBF16, DType::kBF16);
  CheckAgainstReference(DType::kBF16, DType::kF32);
  if (!OnCuda()) CheckAgainstReference(DType::kF64, DType::kF64);
}

// Widths and views that GPU kernels move in packs of 16 bytes, and such that they cannot.
TEST(RmsNormTest, WholeAndBrokenPacks) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t width : {8, 264}) {
      for (const MakeTensor make : kAlignments) CheckAgainstReference(dtype, dtype, width, make);
    }
  }
}

// More tokens than one partial sum of the weight gradient holds, so the partials must be joined.
TEST(RmsNormTest, WeightGradientOverManyTokens) {
  constexpr int64_t kMany = 300, kWide = 5;
  Context ctx = OpContext();
  const DType dtype = OnCuda() ? DType::kF32 : DType::kF64;
  const Vec x = Normal(kMany * kWide, 1), dy = Normal(kMany * kWide, 2), w = Normal(kWide, 3);
  const Tensor tx = FromVec(ctx, {kMany, kWide}, dtype, x);
  const Tensor tw = FromVec(ctx, {kWide}, dtype, w);
  Tensor dw = ctx.Zeros({kWide}, dtype);
  const Tensor rstd = ops::RmsNormForward(ctx, tx, tw, kEps).rstd;
  ops::RmsNormBackward(ctx, FromVec(ctx, {kMany, kWide}, dtype, dy), tx, tw, rstd, dw);
  Vec expected(kWide);  // y is linear in w
  const Vec unit = Reference(x, Vec(kWide, 1.0));
  for (size_t i = 0; i < x.size(); ++i) expected[i % kWide] += dy[i] * unit[i];
  EXPECT_LE(RelRms(ToVec(dw), expected), Bound(dtype, expected));
}

// The squares of the second row overflow f32, those of the third are lost in eps.
TEST(RmsNormTest, HugeFiniteRowsStayFinite) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Context ctx = OpContext();
    Vec x = Normal(3 * kD, 1, dtype), w = Normal(kD, 2, dtype);
    for (size_t d = 0; d < kD; ++d) {
      x[kD + d] = d % 2 == 0 ? 2e19 : -3e19;
      x[2 * kD + d] *= 0x1p-100;
    }
    x = RoundedTo(dtype, x);
    const Tensor tx = FromVec(ctx, {3, kD}, dtype, x), tw = FromVec(ctx, {kD}, dtype, w);
    const auto [y, rstd] = ops::RmsNormForward(ctx, tx, tw, kEps);
    const Vec expected = Reference(x, w);
    EXPECT_LE(RelRms(ToVec(y), expected), Bound(dtype, expected));
    Tensor dw = ctx.Zeros({kD}, DType::kF32);
    const Vec dy = Normal(3 * kD, 3, dtype);
    const Tensor dx = ops::RmsNormBackward(ctx, FromVec(ctx, {3, kD}, dtype, dy), tx, tw, rstd, dw);
    for (const double v : ToVec(dx)) EXPECT_TRUE(std::isfinite(v));
    Vec expected_dw(kD);  // y is linear in w
    const Vec unit = Reference(x, Vec(kD, 1.0));
    for (size_t i = 0; i < x.size(); ++i) expected_dw[i % kD] += dy[i] * unit[i];
    EXPECT_LE(RelRms(ToVec(dw), expected_dw), 1e-6);
  }
}

TEST(RmsNormTest, NotFiniteStaysVisible) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Context ctx = OpContext();
    Vec x = Normal(2 * kD, 1);
    x[kD + 7] = bad;
    const auto [y, rstd] =
        ops::RmsNormForward(ctx, FromVec(ctx, {2, kD}, DType::kF32, x),
                            FromVec(ctx, {kD}, DType::kF32, Normal(kD, 2)), kEps);
    EXPECT_TRUE(std::isnan(ToVec(y)[kD + 7]));
    EXPECT_TRUE(std::isfinite(ToVec(y)[7]));
  }
}

TEST(RmsNormTest, SameBitsForAnyThreads) {
  for (const DType dtype : FloatDtypes()) {
    ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
      const Tensor x = FromVec(ctx, {515, kD}, dtype, Normal(515 * kD, 1, dtype));
      const Tensor w = FromVec(ctx, {kD}, dtype, Normal(kD, 2, dtype));
      Tensor dw = FromVec(ctx, {kD}, AccumulatorOf(dtype), Normal(kD, 3));
      const auto [y, rstd] = ops::RmsNormForward(ctx, x, w, kEps);
      return {y, rstd, ops::RmsNormBackward(ctx, y, x, w, rstd, dw), dw};
    });
  }
}

TEST(RmsNormTest, NoTokens) {
  Context ctx = OpContext();
  const Tensor x = ctx.Empty({0, kD}, DType::kF32), w = ctx.Zeros({kD}, DType::kF32);
  const Vec before = Normal(kD, 4);
  Tensor dw = FromVec(ctx, {kD}, DType::kF32, before);
  const auto [y, rstd] = ops::RmsNormForward(ctx, x, w, kEps);
  EXPECT_EQ(y.shape(), x.shape());
  EXPECT_EQ(ops::RmsNormBackward(ctx, y, x, w, rstd, dw).shape(), x.shape());
  EXPECT_EQ(ToVec(dw), before);
}

TEST(RmsNormTest, RefusesWhatDoesNotFit) {
  Context ctx = OpContext();
  const Tensor x = ctx.Zeros({2, 3}, DType::kF32), w = ctx.Zeros({3}, DType::kF32);
  EXPECT_THROW(ops::RmsNormForward(ctx, x, ctx.Zeros({4}, DType::kF32), kEps), InvalidArgument);
  EXPECT_THROW(ops::RmsNormForward(ctx, x, ctx.Zeros({3}, DType::kF64), kEps), InvalidArgument);
  // 1e-46 is zero in f32.
  for (const double eps : {0.0, -1.0, 1e-46, std::numeric_limits<double>::quiet_NaN(),
                           std::numeric_limits<double>::infinity()}) {
    EXPECT_THROW(ops::RmsNormForward(ctx, x, w, eps), InvalidArgument) << eps;
  }
  const Tensor x64 = ctx.Zeros({2, 3}, DType::kF64), w64 = ctx.Zeros({3}, DType::kF64);
  if (OnCuda()) {
    EXPECT_THROW(ops::RmsNormForward(ctx, x64, w64, kEps), Unsupported);
  } else {
    EXPECT_NO_THROW(ops::RmsNormForward(ctx, x64, w64, 1e-46));
  }
  Tensor narrow = ctx.Zeros({3}, DType::kBF16);
  EXPECT_THROW(ops::RmsNormBackward(ctx, x, x, w, ctx.Zeros({2}, DType::kF32), narrow),
               InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
