#include "ops/rope/rope.h"

#include <cmath>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kT = 7, kH = 3, kD = 10;  // D/2 = 5 divides no vector width
constexpr double kTheta = 10000;
const std::vector<int64_t> kPositions = {0, 1, 2, 0, 1, 4095, 1 << 20};  // documents restart

Tensor Positions(const std::vector<int64_t>& values) {  // in host memory
  Context host(ContextOptions{.threads = 1});
  Tensor t = host.Empty({static_cast<int64_t>(values.size())}, DType::kI64);
  std::copy(values.begin(), values.end(), t.data<int64_t>());
  return t;
}

// The rotation written as multiplication of complex numbers, in long double.
Vec Reference(const Vec& x, const std::vector<int64_t>& positions, int64_t heads, int64_t dim) {
  Vec y(x.size());
  for (size_t row = 0; row < x.size() / static_cast<size_t>(dim); ++row) {
    const auto position = static_cast<long double>(positions[row / static_cast<size_t>(heads)]);
    const size_t at = row * static_cast<size_t>(dim), half = static_cast<size_t>(dim) / 2;
    for (size_t i = 0; i < half; ++i) {
      const long double angle =
          position / std::pow(static_cast<long double>(kTheta),
                              2.0L * static_cast<long double>(i) / static_cast<long double>(dim));
      const long double re = x[at + i], im = x[at + i + half];
      y[at + i] = static_cast<double>(re * std::cos(angle) - im * std::sin(angle));
      y[at + i + half] = static_cast<double>(re * std::sin(angle) + im * std::cos(angle));
    }
  }
  return y;
}

// `dim` 10 is odd for packs, 32 a multiple of them.
void CheckRotation(DType dtype, int64_t dim, MakeTensor make) {
  Context ctx = OpContext();
  const int64_t n = kT * kH * dim;
  const Vec x = Normal(n, 1, dtype), dy = Normal(n, 2, dtype);
  const ops::RopeTable table =
      ops::MakeRopeTable(ctx, Positions(kPositions), {.theta = kTheta, .head_dim = dim}, dtype);
  const Tensor y = ops::RopeForward(ctx, make(ctx, {kT, kH, dim}, dtype, x), table);
  const Tensor dx = ops::RopeBackward(ctx, make(ctx, {kT, kH, dim}, dtype, dy), table);
  const Vec expected = Reference(x, kPositions, kH, dim);
  // f64 angles at position 2^20 are off by up to 2^20 * 2^-53.
  const double f64_bound = 1e-9;
  EXPECT_LE(RelRms(ToVec(y), expected), dtype == DType::kF64 ? f64_bound : Bound(dtype, expected));
  Vec at = x;
  const Vec gradient =
      NumericGradient(at, [&] { return Dot(Reference(at, kPositions, kH, dim), dy); });
  EXPECT_LE(RelRms(ToVec(dx), gradient), std::max(1e-6, Bound(dtype, gradient)));
}

TEST(RopeTest, MatchesComplexRotationAndItsTranspose) {
  for (const DType dtype : FloatDtypes()) {
    for (const int64_t dim : {kD, int64_t{32}}) {
      for (const MakeTensor make : kAlignments) CheckRotation(dtype, dim, make);
    }
  }
}

TEST(RopeTest, TableIsRightAtOneMillion) {
  constexpr int64_t kDim = 128;
  const std::vector<int64_t> positions = {(1 << 20) - 1, 1 << 20, (1 << 20) + 12345};
  for (const double theta : {10000.0, 500000.0}) {
    Context ctx = OpContext();
    const auto table = ops::MakeRopeTable(ctx, Positions(positions),
                                          {.theta = theta, .head_dim = kDim}, DType::kF64);
    const auto rounded = ops::MakeRopeTable(ctx, Positions(positions),
                                            {.theta = theta, .head_dim = kDim}, DType::kBF16);
    ASSERT_EQ(rounded.cos.dtype(), DType::kF32);
    const Vec cosines = ToVec(table.cos), sines = ToVec(table.sin), f32 = ToVec(rounded.sin);
    for (size_t i = 0; i < cosines.size(); ++i) {
      const long double angle =
          static_cast<long double>(positions[i / 64]) *
          std::pow(static_cast<long double>(theta), -static_cast<long double>(i % 64) / 64);
      EXPECT_NEAR(cosines[i], static_cast<double>(std::cos(angle)), 1e-9);
      EXPECT_NEAR(sines[i], static_cast<double>(std::sin(angle)), 1e-9);
      EXPECT_NEAR(f32[i], static_cast<double>(std::sin(angle)), 6.1e-8);
    }
  }
}

TEST(RopeTest, SameBitsForAnyThreads) {
  for (const DType dtype : FloatDtypes()) {
    ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
      std::vector<int64_t> positions(200);
      for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int64_t>(i * i);
      const auto table =
          ops::MakeRopeTable(ctx, Positions(positions), {.theta = kTheta, .head_dim = kD}, dtype);
      const Tensor x = FromVec(ctx, {200, kH, kD}, dtype, Normal(200 * kH * kD, 1, dtype));
      return {ops::RopeForward(ctx, x, table), ops::RopeBackward(ctx, x, table)};
    });
  }
}

TEST(RopeTest, NoTokensAndWrongShapes) {
  Context ctx = OpContext();
  const auto table =
      ops::MakeRopeTable(ctx, Positions({}), {.theta = kTheta, .head_dim = kD}, DType::kF32);
  EXPECT_EQ(ops::RopeForward(ctx, ctx.Empty({0, kH, kD}, DType::kF32), table).numel(), 0);
  EXPECT_THROW(ops::RopeForward(ctx, ctx.Zeros({1, kH, kD}, DType::kF32), table), InvalidArgument);
  EXPECT_THROW(ops::RopeForward(ctx, ctx.Zeros({0, kH, kD}, DType::kF64), table), InvalidArgument);
  EXPECT_THROW(ops::RopeFrequencies({.theta = kTheta, .head_dim = 7}), InvalidArgument);
  EXPECT_THROW(ops::RopeFrequencies({.theta = 0, .head_dim = 8}), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
