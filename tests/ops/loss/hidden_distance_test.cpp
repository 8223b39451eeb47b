#include "ops/loss/hidden_distance.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/loss/linear_cross_entropy.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

double Loss(const Vec& x, const Vec& target, const std::vector<int32_t>& labels) {
  const size_t width = x.size() / labels.size();
  double loss = 0;
  for (size_t t = 0; t < labels.size(); ++t) {
    if (labels[t] < 0) continue;
    double square = 0;
    for (size_t i = t * width; i < (t + 1) * width; ++i) {
      square += (x[i] - target[i]) * (x[i] - target[i]);
    }
    loss += square / static_cast<double>(width);
  }
  return loss;
}

// Every fourth token has no label, whose distance must not count although it is large.
std::vector<int32_t> SomeLabels(int64_t tokens) {
  std::vector<int32_t> labels;
  for (int64_t t = 0; t < tokens; ++t) labels.push_back(t % 4 == 1 ? -1 : 5);
  return labels;
}

void CheckAgainstReference(int64_t tokens, int64_t width, DType dtype, MakeTensor make) {
  Context ctx = OpContext();
  Vec x = Normal(tokens * width, 1, dtype);
  const Vec target = Normal(tokens * width, 2, dtype);
  const std::vector<int32_t> labels = SomeLabels(tokens);
  const Tensor tx = make(ctx, {tokens, width}, dtype, x);
  const Tensor ty = make(ctx, {tokens, width}, dtype, target);
  const Vec sums = ToVec(ops::HiddenDistanceForward(ctx, tx, ty, IntTensor(ctx, labels)));
  const double expected = Loss(x, target, labels);
  ASSERT_EQ(sums.size(), size_t{ops::kLossSums});
  EXPECT_NEAR(sums[ops::kLossSum], expected, (dtype == DType::kF64 ? 1e-13 : 1e-6) * expected);
  EXPECT_EQ(sums[ops::kZLossSum], 0);
  EXPECT_EQ(sums[ops::kValidSum],
            static_cast<double>(std::count_if(labels.begin(), labels.end(),
                                              [](int32_t label) { return label >= 0; })));
  const Vec dx =
      ToVec(ops::HiddenDistanceBackward(ctx, tx, ty, IntTensor(ctx, labels), /*scale=*/1.5));
  const Vec slope = NumericGradient(x, [&] { return 1.5 * Loss(x, target, labels); });
  EXPECT_LE(RelRms(dx, slope), std::max(1e-7, Bound(dtype, slope)));
}

TEST(HiddenDistanceTest, MatchesReferenceAndFiniteDifferences) {
  for (const DType dtype : FloatDtypes()) {
    for (const int64_t width : {5, 8}) {
      for (const MakeTensor make : kAlignments) CheckAgainstReference(7, width, dtype, make);
    }
  }
  CheckAgainstReference(131, 264, DType::kBF16, FromVecAligned);  // several blocks of tokens
}

TEST(HiddenDistanceTest, EqualStatesCostNothing) {
  Context ctx = OpContext();
  const Tensor x = FromVec(ctx, {3, 5}, DType::kF32, Normal(15, 1));
  const Tensor labels = IntTensor(ctx, {1, 2, -1});
  EXPECT_EQ(ToVec(ops::HiddenDistanceForward(ctx, x, x, labels)), (Vec{0, 0, 2}));
  EXPECT_EQ(ToVec(ops::HiddenDistanceBackward(ctx, x, x, labels, 1)), Vec(15));
}

// A token without a label may hold anything.
TEST(HiddenDistanceTest, WhatIsNotFiniteShowsWhereItCounts) {
  Context ctx = OpContext();
  Vec x = Normal(15, 1);
  x[7] = std::numeric_limits<double>::quiet_NaN();
  const Tensor tx = FromVec(ctx, {3, 5}, DType::kF32, x);
  const Tensor target = FromVec(ctx, {3, 5}, DType::kF32, Normal(15, 2));
  const auto loss = [&](const std::vector<int32_t>& labels) {
    return ToVec(ops::HiddenDistanceForward(ctx, tx, target, IntTensor(ctx, labels)))[0];
  };
  EXPECT_TRUE(std::isfinite(loss({1, -1, 1})));
  EXPECT_TRUE(std::isnan(loss({1, 1, 1})));
}

TEST(HiddenDistanceTest, SameBitsForAnyThreads) {
  for (const DType dtype : FloatDtypes()) {
    ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
      const Tensor x = FromVec(ctx, {515, 33}, dtype, Normal(515 * 33, 1, dtype));
      const Tensor target = FromVec(ctx, {515, 33}, dtype, Normal(515 * 33, 2, dtype));
      const Tensor labels = IntTensor(ctx, SomeLabels(515));
      return {ops::HiddenDistanceForward(ctx, x, target, labels),
              ops::HiddenDistanceBackward(ctx, x, target, labels, 0.7)};
    });
  }
}

TEST(HiddenDistanceTest, NoTokens) {
  Context ctx = OpContext();
  const Tensor x = ctx.Empty({0, 5}, DType::kF32), labels = ctx.Empty({0}, DType::kI32);
  EXPECT_EQ(ToVec(ops::HiddenDistanceForward(ctx, x, x, labels)), Vec(3));
  EXPECT_EQ(ops::HiddenDistanceBackward(ctx, x, x, labels, 1).shape(), x.shape());
}

TEST(HiddenDistanceTest, RefusesWhatDoesNotFit) {
  Context ctx = OpContext();
  const Tensor x = ctx.Zeros({2, 3}, DType::kF32), labels = IntTensor(ctx, {0, 1});
  EXPECT_THROW(ops::HiddenDistanceForward(ctx, x, ctx.Zeros({2, 4}, DType::kF32), labels),
               InvalidArgument);
  EXPECT_THROW(ops::HiddenDistanceForward(ctx, x, ctx.Zeros({2, 3}, DType::kBF16), labels),
               InvalidArgument);
  EXPECT_THROW(ops::HiddenDistanceBackward(ctx, x, x, IntTensor(ctx, {0}), 1), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
