#include <cmath>
#include <limits>

#include "ops/activation/gelu.h"
#include "ops/activation/swiglu.h"
#include "ops/elementwise/exp.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kT = 7, kD = 33;

double Silu(double g) { return g / (1 + std::exp(-g)); }
double Gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

Vec SwiGlu(const Vec& gate, const Vec& up) {
  Vec y(gate.size());
  for (size_t i = 0; i < y.size(); ++i) y[i] = Silu(gate[i]) * up[i];
  return y;
}

Vec Each(const Vec& x, double (*f)(double)) {
  Vec y(x.size());
  for (size_t i = 0; i < y.size(); ++i) y[i] = f(x[i]);
  return y;
}

void ExpectGradient(const Tensor& actual, const Vec& expected) {
  EXPECT_LE(RelRms(ToVec(actual), expected), std::max(1e-6, Bound(actual.dtype(), expected)));
}

void CheckSwiGlu(DType dtype, MakeTensor make) {
  Context ctx = OpContext();
  Vec gate = Normal(kT * kD, 1, dtype), up = Normal(kT * kD, 2, dtype);
  const Vec dy = Normal(kT * kD, 3, dtype);
  const Tensor tg = make(ctx, {kT, kD}, dtype, gate), tu = make(ctx, {kT, kD}, dtype, up);
  const Vec expected = SwiGlu(gate, up);
  EXPECT_LE(RelRms(ToVec(ops::SwiGluForward(ctx, tg, tu)), expected), Bound(dtype, expected));
  const auto [dgate, dup] = ops::SwiGluBackward(ctx, FromVec(ctx, {kT, kD}, dtype, dy), tg, tu);
  const auto f = [&] { return Dot(SwiGlu(gate, up), dy); };
  ExpectGradient(dgate, NumericGradient(gate, f));
  ExpectGradient(dup, NumericGradient(up, f));
}

TEST(SwiGluTest, MatchesReferenceAndFiniteDifferences) {
  for (const DType dtype : FloatDtypes()) {
    for (const MakeTensor make : kAlignments) CheckSwiGlu(dtype, make);
  }
}

TEST(GeluTest, MatchesReferenceAndFiniteDifferences) {
  for (const DType dtype : FloatDtypes()) {
    Context ctx = OpContext();
    Vec x = Normal(kT * kD, 1, dtype);
    const Vec dy = Normal(kT * kD, 3, dtype);
    const Tensor tx = FromVec(ctx, {kT, kD}, dtype, x);
    const Vec expected = Each(x, Gelu);
    EXPECT_LE(RelRms(ToVec(ops::GeluForward(ctx, tx)), expected), Bound(dtype, expected));
    ExpectGradient(ops::GeluBackward(ctx, FromVec(ctx, {kT, kD}, dtype, dy), tx),
                   NumericGradient(x, [&] { return Dot(Each(x, Gelu), dy); }));
  }
}

// Far from zero the gates are 0 or 1: no overflow, no NaN, and the sign is right.
TEST(ActivationTest, LargeInputs) {
  for (const DType dtype : FloatDtypes()) {
    Context ctx = OpContext();
    const Vec x = {-1e30, -3000, -90, -40, 40, 90, 3000, 1e30};
    const Tensor tx = FromVec(ctx, {8}, dtype, x), ones = FromVec(ctx, {8}, dtype, Vec(8, 1.0));
    const Vec values = ToVec(tx);
    const Vec results[] = {ToVec(ops::SwiGluForward(ctx, tx, ones)),
                           ToVec(ops::GeluForward(ctx, tx))};
    const Vec slopes[] = {ToVec(ops::SwiGluBackward(ctx, ones, tx, ones).dgate),
                          ToVec(ops::GeluBackward(ctx, ones, tx))};
    for (size_t i = 0; i < values.size(); ++i) {
      for (const Vec& y : results) {
        // The saturated f32 exponential leaves 3e-39 instead of 0, times the input.
        EXPECT_NEAR(y[i], std::max(values[i], 0.0),
                    1e-7 * std::max(1.0, std::abs(values[i]) * 1e-30))
            << values[i];
      }
      for (const Vec& d : slopes) EXPECT_NEAR(d[i], values[i] > 0 ? 1.0 : 0.0, 1e-7) << values[i];
    }
  }
}

TEST(ActivationTest, NanStaysNan) {
  Context ctx = OpContext();
  const Tensor x = FromVec(ctx, {1}, DType::kF32, {std::numeric_limits<double>::quiet_NaN()});
  EXPECT_TRUE(std::isnan(ToVec(ops::SwiGluForward(ctx, x, x))[0]));
  EXPECT_TRUE(std::isnan(ToVec(ops::GeluForward(ctx, x))[0]));
}

TEST(ActivationTest, SameBitsForAnyThreadsAndEmpty) {
  for (const DType dtype : FloatDtypes()) {
    for (const int64_t n : {int64_t{0}, int64_t{70001}}) {
      ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
        const Tensor a = FromVec(ctx, {n}, dtype, Normal(n, 1, dtype));
        const Tensor b = FromVec(ctx, {n}, dtype, Normal(n, 2, dtype));
        const auto [da, db] = ops::SwiGluBackward(ctx, a, b, a);
        return {ops::SwiGluForward(ctx, a, b), da, db, ops::GeluForward(ctx, a),
                ops::GeluBackward(ctx, a, b)};
      });
    }
  }
}

TEST(ActivationTest, RefusesMixedOperands) {
  Context ctx = OpContext();
  const Tensor a = ctx.Zeros({3}, DType::kF32), b = ctx.Zeros({3}, DType::kBF16);
  EXPECT_THROW(ops::SwiGluForward(ctx, a, b), InvalidArgument);
  EXPECT_THROW(ops::SwiGluBackward(ctx, b, a, a), InvalidArgument);
  EXPECT_THROW(ops::GeluBackward(ctx, a, ctx.Zeros({4}, DType::kF32)), InvalidArgument);
}

TEST(ExpTest, CloseToTheLibraryOverTheWholeRange) {
  using ops::internal::Exp;
  double worst = 0;
  for (float x = -87.0f; x < 88.0f; x += 0.00371f) {
    const double exact = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(Exp(x)) - exact) / exact);
  }
  EXPECT_LT(worst, 2e-7);
  EXPECT_EQ(Exp(0.0f), 1.0f);
  EXPECT_EQ(Exp(-100.0f), 0.0f);
  EXPECT_EQ(Exp(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_GT(Exp(1000.0f), 2e38f);
  EXPECT_TRUE(std::isfinite(Exp(std::numeric_limits<float>::infinity())));
  EXPECT_TRUE(std::isnan(Exp(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace
}  // namespace longspan::test
