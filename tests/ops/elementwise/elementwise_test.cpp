#include "ops/elementwise/elementwise.h"

#include <cmath>
#include <limits>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr std::pair<DType, DType> kPairs[] = {{DType::kF32, DType::kF32},
                                              {DType::kF32, DType::kBF16},
                                              {DType::kBF16, DType::kF32},
                                              {DType::kBF16, DType::kBF16},
                                              {DType::kF64, DType::kF64}};

void CheckSum(DType da, DType db, int64_t n) {
  for (const MakeTensor make_a : kAlignments) {
    for (const MakeTensor make_b : kAlignments) {
      Context ctx = OpContext();
      const Vec a = Normal(n, 1, da), b = Normal(n, 2, db);
      Tensor ta = make_a(ctx, {n}, da, a);
      const Tensor tb = make_b(ctx, {n}, db, b);
      Vec sum = a;
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += b[i];
      if (da != DType::kF64) sum = RoundedTo(da, RoundedTo(DType::kF32, sum));
      const Tensor fresh = ops::Add(ctx, ta, tb);
      EXPECT_EQ(fresh.dtype(), da);
      EXPECT_EQ(ToVec(fresh), sum);
      EXPECT_TRUE(SameBits(ops::ResidualAdd(ctx, ta, tb), fresh));
      EXPECT_EQ(ToVec(ta), a);
      ops::AddInto(ctx, ta, tb);
      EXPECT_EQ(ToVec(ta), sum);
    }
  }
}

TEST(ElementwiseTest, AddsMixedDtypesWithOneRounding) {
  for (const auto& [da, db] : kPairs) {
    if (da == DType::kF64 && OnCuda()) continue;
    for (const int64_t n : {0, 1, 8, 1023, 70001}) CheckSum(da, db, n);
  }
}

// Sums over the model and over tokens stay f64 on every device.
TEST(ElementwiseTest, AddsF64Scalars) {
  Context ctx = OpContext();
  const Vec a = {1, 1e-300, 3}, b = {0x1p-50, 2e-300, -7};
  Tensor ta = FromVec(ctx, {3}, DType::kF64, a);
  ops::AddInto(ctx, ta, FromVec(ctx, {3}, DType::kF64, b));
  EXPECT_EQ(ToVec(ta), (Vec{1 + 0x1p-50, 1e-300 + 2e-300, -4}));
}

TEST(ElementwiseTest, GpusRefuseF64ByName) {
  if (!OnCuda()) return;
  Context ctx = OpContext();
  Tensor t = FromVec(ctx, {2}, DType::kF64, {1, 2}), f32 = ctx.Zeros({2}, DType::kF32);
  EXPECT_THROW(ops::Scale(ctx, t, 2), Unsupported);
  EXPECT_THROW(ops::Fill(ctx, t, 2), Unsupported);
  EXPECT_THROW(ops::Add(ctx, t, t), Unsupported);
  EXPECT_THROW(ops::CastInto(ctx, f32, t), Unsupported);
  EXPECT_EQ(ToVec(t), (Vec{1, 2}));
}

TEST(ElementwiseTest, CastsBetweenAllFloatDtypes) {
  for (const DType from : FloatDtypes()) {
    for (const DType to : FloatDtypes()) {
      Context ctx = OpContext();
      const Vec x = Normal(33003, 1, from);
      const Tensor in = FromVec(ctx, {3, 11001}, from, x);
      const Tensor out = ops::Cast(ctx, in, to);
      EXPECT_EQ(out.dtype(), to);
      EXPECT_EQ(out.shape(), in.shape());
      EXPECT_EQ(ToVec(out), RoundedTo(to, ToVec(in)));
      EXPECT_NE(out.raw(), in.raw());
    }
  }
}

TEST(ElementwiseTest, ScaleAndFill) {
  for (const DType dtype : FloatDtypes()) {
    Context ctx = OpContext();
    const Vec x = Normal(40001, 1, dtype);
    for (const MakeTensor make : kAlignments) {
      Tensor t = make(ctx, {40001}, dtype, x);
      ops::Scale(ctx, t, -0.5);
      Vec expected = x;
      for (double& v : expected) v *= -0.5;
      EXPECT_EQ(ToVec(t), expected);
      ops::Fill(ctx, t, 1.5);
      EXPECT_EQ(ToVec(t), Vec(40001, 1.5));
    }
  }
}

TEST(ElementwiseTest, ClampsToARange) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : FloatDtypes()) {
    Context ctx = OpContext();
    Tensor t = FromVec(ctx, {6}, dtype, {-0.5, 0, 0.25, 1, 1.5, nan});
    ops::Clamp(ctx, t, 0, 1);
    const Vec clamped = ToVec(t);
    EXPECT_EQ(Vec(clamped.begin(), clamped.end() - 1), (Vec{0, 0, 0.25, 1, 1}));
    EXPECT_TRUE(std::isnan(clamped.back()));
    EXPECT_THROW(ops::Clamp(ctx, t, 1, 0), InvalidArgument);
  }
}

TEST(ElementwiseTest, AddsRowsInOrder) {
  for (const DType dtype : FloatDtypes()) {
    if (dtype == DType::kBF16) continue;
    for (const int64_t count : {1, 5, 16, 77}) {
      Context ctx = OpContext();
      const Vec rows = Normal(count * 1500, 1), before = Normal(1500, 2);
      Tensor dst = FromVec(ctx, {1500}, dtype, before);
      ops::AddRowsInto(ctx, dst, FromVec(ctx, {count, 1500}, dtype, rows));
      Vec expected = before;
      for (size_t i = 0; i < rows.size(); ++i) expected[i % 1500] += rows[i];
      EXPECT_LE(RelRms(ToVec(dst), expected), Bound(dtype, expected));
      const Vec now = ToVec(dst);
      ops::AddRowsInto(ctx, dst, ctx.Empty({0, 1500}, dtype));
      EXPECT_EQ(ToVec(dst), now);
    }
  }
}

TEST(ElementwiseTest, RefusesWhatDoesNotMix) {
  Context ctx = OpContext();
  Tensor a = ctx.Zeros({4}, DType::kF32), b = ctx.Zeros({4}, DType::kF64);
  EXPECT_THROW(ops::AddInto(ctx, a, b), InvalidArgument);
  EXPECT_THROW(ops::Add(ctx, b, a), InvalidArgument);
  EXPECT_THROW(ops::Add(ctx, a, ctx.Zeros({2, 2}, DType::kF32)), InvalidArgument);
  EXPECT_THROW(ops::CastInto(ctx, a, b = ctx.Zeros({5}, DType::kF64)), InvalidArgument);
  Tensor ints = ctx.Zeros({4}, DType::kI32);
  EXPECT_THROW(ops::Scale(ctx, ints, 2), InvalidArgument);
  EXPECT_THROW(ops::Fill(ctx, ints, 2), InvalidArgument);
}

// Ties, carries into the exponent, overflow, subnormals and NaN, at every place of a pack and in
// views that kernels move element by element.
TEST(ElementwiseTest, RoundsToBf16AtEveryPlace) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  const Vec values = {1 + 0x1p-8,
                      1 + 0x3p-8,
                      1 + 0x1p-8 + 0x1p-20,
                      -(2 - 0x1p-8),
                      3.4e38,
                      -kInfinity,
                      kNan,
                      0x1p-134,
                      0x3p-134,
                      -0.0,
                      0x1.fep-127,
                      0x1p-149,
                      0.1};
  Vec many;
  for (int i = 0; i < 8; ++i) {
    many.insert(many.end(), values.begin(), values.end());
    many.push_back(i);  // 14 a round: neighbours end up in other places of a pack
  }
  many.push_back(0.1);
  const Vec expected = RoundedTo(DType::kBF16, many);
  const auto n = static_cast<int64_t>(many.size());
  for (const MakeTensor make : kAlignments) {
    Context ctx = OpContext();
    const Vec got = ToVec(ops::Cast(ctx, make(ctx, {n}, DType::kF32, many), DType::kBF16));
    for (size_t i = 0; i < many.size(); ++i) {
      if (std::isnan(many[i])) {
        EXPECT_TRUE(std::isnan(got[i])) << i;
      } else {
        EXPECT_EQ(got[i], expected[i]) << many[i] << " at " << i;
        EXPECT_EQ(std::signbit(got[i]), std::signbit(many[i])) << many[i] << " at " << i;
      }
    }
  }
}

}  // namespace
}  // namespace longspan::test
