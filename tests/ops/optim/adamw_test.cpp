#include "ops/optim/adamw.h"

#include <cmath>
#include <limits>

#include "ops/optim/step_control.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kN = 77;

struct State {
  Vec p, m, v;
};

// What a step without clipping decides.
Tensor Record(Context& ctx, double grad_scale, bool apply = true) {
  Vec record(ops::kStepFields);
  record[ops::kStepGradScale] = grad_scale;
  record[ops::kStepApply] = apply ? 1 : 0;
  return FromVec(ctx, {ops::kStepFields}, DType::kF64, record);
}

// The textbook loop, with the moments corrected by their running weights.
void ReferenceStep(const ops::AdamWOptions& o, double grad_scale, const Vec& grad, State& s) {
  for (size_t i = 0; i < grad.size(); ++i) {
    const double g = grad[i] * grad_scale;
    s.m[i] += (1 - o.beta1) * (g - s.m[i]);
    s.v[i] += (1 - o.beta2) * (g * g - s.v[i]);
    const double mhat = s.m[i] / (1 - std::pow(o.beta1, o.step));
    const double vhat = s.v[i] / (1 - std::pow(o.beta2, o.step));
    const double decayed = s.p[i] * (1 - o.lr * o.weight_decay);
    s.p[i] = decayed - o.lr * mhat / (std::sqrt(vhat) + o.eps);
  }
}

TEST(AdamWTest, FollowsTheTextbookForSeveralSteps) {
  for (const DType dtype : FloatDtypes()) {
    if (dtype == DType::kBF16) continue;
    Context ctx = OpContext();
    State s{Normal(kN, 1), Vec(kN), Vec(kN)};
    Tensor p = FromVec(ctx, {kN}, dtype, s.p), m = ctx.Zeros({kN}, dtype),
           v = ctx.Zeros({kN}, dtype);
    const Tensor copy = ctx.Empty({kN}, DType::kBF16);
    for (int64_t step = 1; step <= 5; ++step) {
      // eps is as large as the gradients, so that its place in the formula matters.
      const ops::AdamWOptions o{
          .lr = 0.05, .beta1 = 0.9, .beta2 = 0.95, .eps = 0.2, .weight_decay = 0.3, .step = step};
      const Vec grad = Normal(kN, 10 + static_cast<uint64_t>(step));
      ReferenceStep(o, 0.25, grad, s);
      ops::AdamWStep(ctx, o, Record(ctx, 0.25), p, FromVec(ctx, {kN}, dtype, grad), m, v, copy);
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
  Tensor p = FromVec(ctx, {2}, DType::kF32, {2, 2});
  Tensor m = ctx.Zeros({2}, DType::kF32), v = ctx.Zeros({2}, DType::kF32);
  ops::AdamWStep(ctx, {.lr = 0.1, .weight_decay = 0.5}, {}, p,
                 FromVec(ctx, {2}, DType::kF32, {1e-3, -7}), m, v);
  EXPECT_NEAR(ToVec(p)[0], 2 - 0.1 - 0.1, 1e-5);
  EXPECT_NEAR(ToVec(p)[1], 2 + 0.1 - 0.1, 1e-5);
}

// Ranges begin anywhere in a bucket; each array of a step may be a view of another alignment.
TEST(AdamWTest, RangesAtAnyAlignment) {
  for (int64_t begin = 0; begin < 5; ++begin) {
    for (const int64_t length : {0, 1, 2, 3, 5, 40, 67}) {
      for (const int64_t copy_begin : {begin, begin + 1}) {
        Context ctx = OpContext();
        const int64_t end = begin + length;
        State s{Normal(kN, 1), Normal(kN, 2), Uniform(kN, 3, 0, 1)};
        const State before = s;
        const Vec grad = Normal(kN, 4);
        Tensor p = FromVec(ctx, {kN}, DType::kF32, s.p), m = FromVec(ctx, {kN}, DType::kF32, s.m),
               v = FromVec(ctx, {kN}, DType::kF32, s.v);
        const Tensor g = FromVec(ctx, {kN}, DType::kF32, grad);
        const Tensor copy = FromVec(ctx, {kN}, DType::kBF16, Vec(kN, 7));
        Tensor pr = p.Rows(begin, end), mr = m.Rows(begin, end), vr = v.Rows(begin, end);
        const ops::AdamWOptions o{.lr = 0.01, .weight_decay = 0.1, .step = 3};
        ops::AdamWStep(ctx, o, Record(ctx, 0.5), pr, g.Rows(begin, end), mr, vr,
                       copy.Rows(copy_begin, copy_begin + length));
        ReferenceStep(o, 0.5, grad, s);
        const Vec pv = ToVec(p), mv = ToVec(m), vv = ToVec(v), rounded = ToVec(copy);
        for (size_t i = 0; i < kN; ++i) {
          const bool inside = static_cast<int64_t>(i) >= begin && static_cast<int64_t>(i) < end;
          const auto near = [&](double actual, double stepped, double old) {
            if (!inside) return actual == old;
            return std::abs(actual - stepped) <= 1e-6 * std::max(1.0, std::abs(stepped));
          };
          EXPECT_TRUE(near(pv[i], s.p[i], before.p[i])) << begin << " " << length << " " << i;
          EXPECT_TRUE(near(mv[i], s.m[i], before.m[i])) << begin << " " << length << " " << i;
          EXPECT_TRUE(near(vv[i], s.v[i], before.v[i])) << begin << " " << length << " " << i;
          const int64_t at = static_cast<int64_t>(i) - copy_begin;
          const bool copied = at >= 0 && at < length;
          const double expected = copied ? pv[static_cast<size_t>(begin + at)] : 7;
          EXPECT_EQ(rounded[i], RoundedTo(DType::kBF16, {expected})[0]) << i;
        }
      }
    }
  }
}

TEST(AdamWTest, ARecordThatSaysNoChangesNothing) {
  Context ctx = OpContext();
  const Vec start = Normal(kN, 1);
  Tensor p = FromVec(ctx, {kN}, DType::kF32, start), m = FromVec(ctx, {kN}, DType::kF32, start),
         v = FromVec(ctx, {kN}, DType::kF32, start);
  const Tensor copy = FromVec(ctx, {kN}, DType::kBF16, Vec(kN, 7));
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  const Tensor g = FromVec(ctx, {kN}, DType::kF32, Vec(kN, kNan));
  ops::AdamWStep(ctx, {.lr = 0.1, .weight_decay = 0.1}, Record(ctx, kNan, false), p, g, m, v, copy);
  for (const Tensor* t : {&p, &m, &v}) EXPECT_EQ(ToVec(*t), start);
  EXPECT_EQ(ToVec(copy), Vec(kN, 7));
}

TEST(AdamWTest, RangesOfABucketStepAlone) {
  Context ctx = OpContext();
  const Vec start = Normal(kN, 1), grad = Normal(kN, 2);
  Tensor p = FromVec(ctx, {kN}, DType::kF32, start), g = FromVec(ctx, {kN}, DType::kF32, grad);
  Tensor m = ctx.Zeros({kN}, DType::kF32), v = ctx.Zeros({kN}, DType::kF32);
  Tensor part = p.Rows(10, 30), pm = m.Rows(10, 30), pv = v.Rows(10, 30);
  ops::AdamWStep(ctx, {.lr = 0.1}, {}, part, g.Rows(10, 30), pm, pv);
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
      ops::AdamWStep(ctx, {.lr = 0.01, .weight_decay = 0.1, .step = 3}, {}, pr, g.Rows(begin, end),
                     mr, vr, copy.Rows(begin, end));
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
  EXPECT_THROW(ops::AdamWStep(ctx, {}, {}, p, wrong, m, v), InvalidArgument);
  EXPECT_THROW(ops::AdamWStep(ctx, {}, {}, p, p, m, v, p), InvalidArgument);
  EXPECT_THROW(ops::AdamWStep(ctx, {}, {}, half, half, half, half), InvalidArgument);
  EXPECT_THROW(ops::AdamWStep(ctx, {.step = 0}, {}, p, p, m, v), InvalidArgument);
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const double eps : {0.0, -1e-8, 1e-46, kNan, kInfinity}) {  // 1e-46 is zero in f32
    EXPECT_THROW(ops::AdamWStep(ctx, {.eps = eps}, {}, p, p, m, v), InvalidArgument) << eps;
  }
  for (const double bad : {kNan, kInfinity, -kInfinity, 1e39}) {  // 1e39 is infinite in f32
    EXPECT_THROW(ops::AdamWStep(ctx, {.lr = bad}, {}, p, p, m, v), InvalidArgument) << bad;
    EXPECT_THROW(ops::AdamWStep(ctx, {.weight_decay = bad}, {}, p, p, m, v), InvalidArgument)
        << bad;
  }
  EXPECT_EQ(ToVec(p), Vec(4));
  EXPECT_EQ(ToVec(m), Vec(4));
  EXPECT_THROW(ops::AdamWStep(ctx, {}, ctx.Zeros({3}, DType::kF64), p, p, m, v), InvalidArgument);
  if (OnCuda()) {
    EXPECT_THROW(ops::AdamWStep(ctx, {}, {}, wrong, wrong, wrong, wrong), Unsupported);
  } else {
    EXPECT_NO_THROW(ops::AdamWStep(ctx, {.eps = 1e-46}, {}, wrong, wrong, wrong, wrong));
  }
}

}  // namespace
}  // namespace longspan::test
