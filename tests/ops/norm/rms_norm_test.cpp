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

// More tokens than one partial sum of the weight gradient holds, so the partials must be joined;
// the last one holds fewer.
TEST(RmsNormTest, WeightGradientOverManyTokens) {
  constexpr int64_t kMany = 1300;
  for (const int64_t wide : {5, 8}) {
    Context ctx = OpContext();
    const DType dtype = OnCuda() ? DType::kF32 : DType::kF64;
    const auto n = static_cast<size_t>(wide);
    const Vec x = Normal(kMany * wide, 1), dy = Normal(kMany * wide, 2), w = Normal(wide, 3);
    const Tensor tx = FromVec(ctx, {kMany, wide}, dtype, x);
    const Tensor tw = FromVec(ctx, {wide}, dtype, w);
    Tensor dw = ctx.Zeros({wide}, dtype);
    const Tensor rstd = ops::RmsNormForward(ctx, tx, tw, kEps).rstd;
    ops::RmsNormBackward(ctx, FromVec(ctx, {kMany, wide}, dtype, dy), tx, tw, rstd, dw);
    Vec expected(n);  // y is linear in w
    const Vec unit = Reference(x, Vec(n, 1.0));
    for (size_t i = 0; i < x.size(); ++i) expected[i % n] += dy[i] * unit[i];
    EXPECT_LE(RelRms(ToVec(dw), expected), Bound(dtype, expected));
  }
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

// Shared memory of GPU kernels grows with the width: just below what any kernel may use, above it,
// and more than there is.
TEST(RmsNormTest, WideRows) {
  for (const int64_t width : {2048, 4096, 8192, 8200, 12288, 16384, 32768}) {
    Context ctx = OpContext();
    const Vec x = Normal(2 * width, 1), w = Normal(width, 2), dy = Normal(2 * width, 3);
    const Tensor tx = FromVec(ctx, {2, width}, DType::kF32, x);
    const Tensor tw = FromVec(ctx, {width}, DType::kF32, w);
    Tensor dw = ctx.Zeros({width}, DType::kF32);
    const auto [y, rstd] = ops::RmsNormForward(ctx, tx, tw, kEps);
    EXPECT_LE(RelRms(ToVec(y), Reference(x, w)), 1e-6) << width;
    const Vec dx = ToVec(
        ops::RmsNormBackward(ctx, FromVec(ctx, {2, width}, DType::kF32, dy), tx, tw, rstd, dw));
    Vec expected(dx.size()), expected_dw(w.size());
    for (size_t t = 0; t < 2; ++t) {
      const size_t n = w.size(), row = t * n;
      double square = 0, dot = 0;
      for (size_t d = 0; d < n; ++d) square += x[row + d] * x[row + d];
      const double r = 1 / std::sqrt(square / static_cast<double>(n) + kEps);
      for (size_t d = 0; d < n; ++d) dot += dy[row + d] * w[d] * x[row + d] * r;
      for (size_t d = 0; d < n; ++d) {
        const double xhat = x[row + d] * r;
        expected[row + d] = r * (dy[row + d] * w[d] - xhat * dot / static_cast<double>(n));
        expected_dw[d] += dy[row + d] * xhat;
      }
    }
    EXPECT_LE(RelRms(dx, expected), 1e-6) << width;
    EXPECT_LE(RelRms(ToVec(dw), expected_dw), 1e-6) << width;
  }
  if (!OnCuda()) return;
  Context ctx = OpContext();
  const Tensor x = ctx.Zeros({1, 32776}, DType::kF32), w = ctx.Zeros({32776}, DType::kF32);
  EXPECT_THROW(ops::RmsNormForward(ctx, x, w, kEps), Unsupported);
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
