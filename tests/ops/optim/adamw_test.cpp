#include "ops/optim/adamw.h"

#include <cmath>
#include <limits>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kN = 77;

struct State {
  Vec p, m, v;
};

// The textbook loop, with the moments corrected by their running weights.
void ReferenceStep(const ops::AdamWOptions& o, const Vec& grad, State& s) {
  for (size_t i = 0; i < grad.size(); ++i) {
    const double g = grad[i] * o.grad_scale;
    s.m[i] += (1 - o.beta1) * (g - s.m[i]);
    s.v[i] += (1 - o.beta2) * (g * g - s.v[i]);
    const double mhat = s.m[i] / (1 - std::pow(o.beta1, o.step));
    const double vhat = s.v[i] / (1 - std::pow(o.beta2, o.step));
    const double decayed = s.p[i] * (1 - o.lr * o.weight_decay);
    s.p[i] = decayed - o.lr * mhat / (std::sqrt(vhat) + o.eps);
  }
}

TEST(AdamWTest, FollowsTheTextbookForSeveralSteps) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    Context ctx = OpContext();
    State s{Normal(kN, 1), Vec(kN), Vec(kN)};
    Tensor p = FromVec(ctx, {kN}, dtype, s.p), m = ctx.Zeros({kN}, dtype),
           v = ctx.Zeros({kN}, dtype);
    const Tensor copy = ctx.Empty({kN}, DType::kBF16);
    for (int64_t step = 1; step <= 5; ++step) {
      // eps is as large as the gradients, so that its place in the formula matters.
      const ops::AdamWOptions o{.lr = 0.05,
                                .beta1 = 0.9,
                                .beta2 = 0.95,
                                .eps = 0.2,
                                .weight_decay = 0.3,
                                .step = step,
                                .grad_scale = 0.25};
      const Vec grad = Normal(kN, 10 + static_cast<uint64_t>(step));
      ReferenceStep(o, grad, s);
      ops::AdamWStep(ctx, o, p, FromVec(ctx, {kN}, dtype, grad), m, v, copy);
      const double bound = dtype == DType::kF64 ? 1e-14 : 5e-7;
      EXPECT_LE(RelRms(ToVec(p), s.p), bound);
      EXPECT_LE(RelRms(ToVec(m), s.m), bound);
      EXPECT_LE(RelRms(ToVec(v), s.v), bound);
      EXPECT_EQ(ToVec(copy), RoundedTo(DType::kBF16, ToVec(p)));
    }
  }
}

// With a gradient far above eps the first step moves by lr whatever its size, and decay comes on
// top.
TEST(AdamWTest, FirstStepMovesByTheLearningRate) {
  Context ctx = OpContext();
  Tensor p = FromVec(ctx, {2}, DType::kF64, {2, 2});
  Tensor m = ctx.Zeros({2}, DType::kF64), v = ctx.Zeros({2}, DType::kF64);
  ops::AdamWStep(ctx, {.lr = 0.1, .weight_decay = 0.5}, p,
                 FromVec(ctx, {2}, DType::kF64, {1e-3, -7}), m, v);
  EXPECT_NEAR(ToVec(p)[0], 2 - 0.1 - 0.1, 1e-5);
  EXPECT_NEAR(ToVec(p)[1], 2 + 0.1 - 0.1, 1e-5);
}

TEST(AdamWTest, RangesOfABucketStepAlone) {
  Context ctx = OpContext();
  const Vec start = Normal(kN, 1), grad = Normal(kN, 2);
  Tensor p = FromVec(ctx, {kN}, DType::kF32, start), g = FromVec(ctx, {kN}, DType::kF32, grad);
  Tensor m = ctx.Zeros({kN}, DType::kF32), v = ctx.Zeros({kN}, DType::kF32);
  Tensor part = p.Rows(10, 30), pm = m.Rows(10, 30), pv = v.Rows(10, 30);
  ops::AdamWStep(ctx, {.lr = 0.1}, part, g.Rows(10, 30), pm, pv);
  const Vec after = ToVec(p);
  for (size_t i = 0; i < after.size(); ++i) EXPECT_EQ(after[i] != start[i], i >= 10 && i < 30) << i;
}

TEST(AdamWTest, SameBitsForAnyThreadsAndCut) {
  constexpr int64_t kMany = 100003;
  const auto run = [](Context& ctx, int64_t cut) -> std::vector<Tensor> {
    Tensor p = FromVec(ctx, {kMany}, DType::kF32, Normal(kMany, 1));
    Tensor m = FromVec(ctx, {kMany}, DType::kF32, Normal(kMany, 2));
    Tensor v = FromVec(ctx, {kMany}, DType::kF32, Uniform(kMany, 3, 0, 1));
    const Tensor g = FromVec(ctx, {kMany}, DType::kF32, Normal(kMany, 4));
    const Tensor copy = ctx.Empty({kMany}, DType::kBF16);
    for (const auto& [begin, end] : {std::pair{int64_t{0}, cut}, {cut, p.numel()}}) {
      Tensor pr = p.Rows(begin, end), mr = m.Rows(begin, end), vr = v.Rows(begin, end);
      ops::AdamWStep(ctx, {.lr = 0.01, .weight_decay = 0.1, .step = 3}, pr, g.Rows(begin, end), mr,
                     vr, copy.Rows(begin, end));
    }
    return {p, m, v, copy};
  };
  ExpectSameBitsForAnyThreads([&](Context& ctx) { return run(ctx, 0); });
  Context ctx = OpContext();
  const auto whole = run(ctx, 0), cut = run(ctx, 12345);
  for (size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(SameBits(whole[i], cut[i])) << i;
}

TEST(AdamWTest, RefusesWhatDoesNotFit) {
  Context ctx = OpContext();
  Tensor p = ctx.Zeros({4}, DType::kF32), m = ctx.Zeros({4}, DType::kF32),
         v = ctx.Zeros({4}, DType::kF32);
  Tensor wrong = ctx.Zeros({4}, DType::kF64), half = ctx.Zeros({4}, DType::kBF16);
  EXPECT_THROW(ops::AdamWStep(ctx, {}, p, wrong, m, v), InvalidArgument);
  EXPECT_THROW(ops::AdamWStep(ctx, {}, p, p, m, v, p), InvalidArgument);
  EXPECT_THROW(ops::AdamWStep(ctx, {}, half, half, half, half), InvalidArgument);
  EXPECT_THROW(ops::AdamWStep(ctx, {.step = 0}, p, p, m, v), InvalidArgument);
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const double eps : {0.0, -1e-8, 1e-46, kNan, kInfinity}) {  // 1e-46 is zero in f32
    EXPECT_THROW(ops::AdamWStep(ctx, {.eps = eps}, p, p, m, v), InvalidArgument) << eps;
  }
  for (const double bad : {kNan, kInfinity, -kInfinity, 1e39}) {  // 1e39 is infinite in f32
    EXPECT_THROW(ops::AdamWStep(ctx, {.lr = bad}, p, p, m, v), InvalidArgument) << bad;
    EXPECT_THROW(ops::AdamWStep(ctx, {.weight_decay = bad}, p, p, m, v), InvalidArgument) << bad;
    EXPECT_THROW(ops::AdamWStep(ctx, {.grad_scale = bad}, p, p, m, v), InvalidArgument) << bad;
  }
  EXPECT_EQ(ToVec(p), Vec(4));
  EXPECT_EQ(ToVec(m), Vec(4));
  EXPECT_NO_THROW(ops::AdamWStep(ctx, {.eps = 1e-46}, wrong, wrong, wrong, wrong));
}

}  // namespace
}  // namespace longspan::test
