#include "ops/gate/duo_gate.h"

#include "ops/loss/linear_cross_entropy.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

struct Sizes {
  int64_t tokens, heads, gates, dim;
  int64_t elements() const { return tokens * heads * dim; }
  Shape shape() const { return {tokens, heads, dim}; }
};
// Odd tokens; runs of one gate that are whole packs and such that are not.
constexpr Sizes kSizes[] = {{7, 6, 3, 5}, {5, 4, 1, 8}, {3, 2, 2, 24}};

Vec Gates(int64_t n) { return RoundedTo(DType::kF32, Uniform(n, 9, 0.05, 0.95)); }

Vec Mixed(const Sizes& s, const Vec& full, const Vec& stream, const Vec& alpha) {
  Vec o(full.size());
  for (int64_t i = 0; i < s.elements(); ++i) {
    const int64_t head = i / s.dim % s.heads;
    const double a = alpha[static_cast<size_t>(head / (s.heads / s.gates))];
    const auto at = static_cast<size_t>(i);
    o[at] = a * full[at] + (1 - a) * stream[at];
  }
  return o;
}

void CheckAgainstReference(const Sizes& s, DType dtype, MakeTensor make) {
  Context ctx = OpContext();
  const DType wide = AccumulatorOf(dtype);
  Vec full = Normal(s.elements(), 1, dtype), stream = Normal(s.elements(), 2, dtype);
  Vec alpha = Gates(s.gates);
  const Vec d_out = Normal(s.elements(), 3, dtype), before = Normal(s.gates, 4);
  const Tensor tf = make(ctx, s.shape(), dtype, full), ts = make(ctx, s.shape(), dtype, stream);
  const Tensor ta = make(ctx, {s.gates}, wide, alpha);
  Tensor dalpha = make(ctx, {s.gates}, wide, before);
  const Vec expected = Mixed(s, full, stream, alpha);
  EXPECT_LE(RelRms(ToVec(ops::DuoGateForward(ctx, tf, ts, ta)), expected), Bound(dtype, expected));

  const auto grads =
      ops::DuoGateBackward(ctx, make(ctx, s.shape(), dtype, d_out), tf, ts, ta, dalpha);
  const auto f = [&] { return Dot(Mixed(s, full, stream, alpha), d_out); };
  const Vec dfull = NumericGradient(full, f), dstream = NumericGradient(stream, f);
  Vec da = NumericGradient(alpha, f);
  for (size_t g = 0; g < da.size(); ++g) da[g] += before[g];
  EXPECT_LE(RelRms(ToVec(grads.full), dfull), std::max(1e-7, Bound(dtype, dfull)));
  EXPECT_LE(RelRms(ToVec(grads.stream), dstream), std::max(1e-7, Bound(dtype, dstream)));
  EXPECT_LE(RelRms(ToVec(dalpha), da), dtype == DType::kF64 ? 1e-9 : 5e-6);
}

TEST(DuoGateTest, MatchesReferenceAndFiniteDifferences) {
  for (const DType dtype : FloatDtypes()) {
    for (const Sizes& s : kSizes) {
      for (const MakeTensor make : kAlignments) CheckAgainstReference(s, dtype, make);
    }
  }
}

// Closed and open gates pass a branch through with its bits, whatever the other one holds.
TEST(DuoGateTest, EndsAreTheBranches) {
  const Sizes s = kSizes[0];
  for (const DType dtype : FloatDtypes()) {
    Context ctx = OpContext();
    const Vec full = Normal(s.elements(), 1, dtype), stream = Normal(s.elements(), 2, dtype);
    const Tensor tf = FromVec(ctx, s.shape(), dtype, full);
    const Tensor ts = FromVec(ctx, s.shape(), dtype, stream);
    const Tensor alpha = FromVec(ctx, {s.gates}, AccumulatorOf(dtype), {1, 0, 1});
    const Vec o = ToVec(ops::DuoGateForward(ctx, tf, ts, alpha));
    for (int64_t i = 0; i < s.elements(); ++i) {
      const auto at = static_cast<size_t>(i);
      const int64_t gate = i / s.dim % s.heads / (s.heads / s.gates);
      EXPECT_EQ(o[at], gate == 1 ? stream[at] : full[at]) << i;
    }
  }
}

// More tokens than one partial sum of the gate's gradient holds.
TEST(DuoGateTest, GateGradientOverManyTokens) {
  const Sizes s{2111, 4, 2, 8};
  Context ctx = OpContext();
  const Vec full = Normal(s.elements(), 1), stream = Normal(s.elements(), 2);
  const Vec d_out = Normal(s.elements(), 3);
  Vec expected(2);
  for (int64_t i = 0; i < s.elements(); ++i) {
    const auto at = static_cast<size_t>(i);
    expected[static_cast<size_t>(i / s.dim % s.heads / 2)] += d_out[at] * (full[at] - stream[at]);
  }
  const auto tensor = [&](const Vec& v) { return FromVec(ctx, s.shape(), DType::kF32, v); };
  Tensor dalpha = ctx.Zeros({2}, DType::kF32);
  const Tensor alpha = FromVec(ctx, {2}, DType::kF32, {0.5, 0.25});
  const auto grads = ops::DuoGateBackward(ctx, tensor(d_out), tensor(full), tensor(stream), alpha,
                                          dalpha, /*want_branches=*/false);
  EXPECT_FALSE(grads.full.defined());
  EXPECT_LE(RelRms(ToVec(dalpha), expected), 1e-5);
  Tensor none;  // a frozen gate
  EXPECT_TRUE(ops::DuoGateBackward(ctx, tensor(d_out), tensor(full), tensor(stream), alpha, none)
                  .stream.defined());
}

TEST(DuoGateTest, SameBitsForAnyThreads) {
  const Sizes s{515, 6, 3, 5};
  for (const DType dtype : FloatDtypes()) {
    ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
      const Tensor full = FromVec(ctx, s.shape(), dtype, Normal(s.elements(), 1, dtype));
      const Tensor stream = FromVec(ctx, s.shape(), dtype, Normal(s.elements(), 2, dtype));
      const Tensor alpha = FromVec(ctx, {s.gates}, AccumulatorOf(dtype), Gates(s.gates));
      Tensor dalpha = ctx.Zeros({s.gates}, AccumulatorOf(dtype));
      const Tensor o = ops::DuoGateForward(ctx, full, stream, alpha);
      const auto grads = ops::DuoGateBackward(ctx, o, full, stream, alpha, dalpha);
      return {o, grads.full, grads.stream, dalpha};
    });
  }
}

TEST(DuoGateTest, NoTokens) {
  Context ctx = OpContext();
  const Tensor none = ctx.Empty({0, 4, 8}, DType::kF32);
  const Tensor alpha = FromVec(ctx, {2}, DType::kF32, {0.5, 0.25});
  Tensor dalpha = FromVec(ctx, {2}, DType::kF32, {3, 4});
  EXPECT_EQ(ops::DuoGateForward(ctx, none, none, alpha).shape(), none.shape());
  ops::DuoGateBackward(ctx, none, none, none, alpha, dalpha);
  EXPECT_EQ(ToVec(dalpha), (Vec{3, 4}));
}

TEST(DuoGateTest, PenaltyIsThePriceOfOpenGates) {
  const DType dtype = OnCuda() ? DType::kF32 : DType::kF64;
  Context ctx = OpContext();
  const Tensor alpha = FromVec(ctx, {3}, dtype, {0.5, 0, 0.25});
  Tensor sums = FromVec(ctx, {ops::kLossSums}, DType::kF64, {10, 1, 7});
  const ops::GatePenalty penalty{.weight = 0.5, .share = 0.125};
  ops::GatePenaltyForward(ctx, alpha, penalty, sums);
  EXPECT_EQ(ToVec(sums), (Vec{10 + 0.5 * 7 * 0.75, 1 + 0.125 * 7 * 0.75, 7}));
  Tensor dalpha = FromVec(ctx, {3}, dtype, {1, 2, -3});
  ops::GatePenaltyBackward(ctx, sums, penalty, dalpha);
  EXPECT_EQ(ToVec(dalpha), (Vec{4.5, 5.5, 0.5}));  // 0.5 * 7 more, also at 0
}

TEST(DuoGateTest, RefusesWhatDoesNotFit) {
  Context ctx = OpContext();
  const Tensor x = ctx.Zeros({2, 4, 3}, DType::kF32), alpha = ctx.Zeros({2}, DType::kF32);
  Tensor dalpha = ctx.Zeros({2}, DType::kF32), other = ctx.Zeros({4}, DType::kF32);
  const auto forward = [&](const Tensor& full, const Tensor& stream, const Tensor& gates) {
    ops::DuoGateForward(ctx, full, stream, gates);
  };
  EXPECT_NO_THROW(forward(x, x, alpha));
  EXPECT_THROW(forward(x, ctx.Zeros({2, 4, 4}, DType::kF32), alpha), InvalidArgument);
  EXPECT_THROW(forward(x, ctx.Zeros({2, 4, 3}, DType::kBF16), alpha), InvalidArgument);
  EXPECT_THROW(forward(x, x, ctx.Zeros({3}, DType::kF32)), InvalidArgument);
  EXPECT_THROW(forward(x, x, ctx.Zeros({2}, DType::kBF16)), InvalidArgument);
  EXPECT_THROW(ops::DuoGateBackward(ctx, ctx.Zeros({2, 4, 3}, DType::kBF16), x, x, alpha, dalpha),
               InvalidArgument);
  EXPECT_THROW(ops::DuoGateBackward(ctx, x, x, x, alpha, other), InvalidArgument);
  Tensor sums = ctx.Zeros({2}, DType::kF64);
  EXPECT_THROW(ops::GatePenaltyForward(ctx, alpha, {}, sums), InvalidArgument);
  EXPECT_THROW(ops::GatePenaltyBackward(ctx, sums, {}, dalpha), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
