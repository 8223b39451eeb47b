#include "ops/loss/linear_cross_entropy.h"

#include <cmath>
#include <limits>

#include "ops/gemm/gemm.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kT = 7, kD = 33, kV = 37;
const std::vector<int32_t> kLabels = {5, -1, 0, 36, 36, -1, 12};
constexpr double kZLoss = 0.03;  // large enough that a wrong term fails
constexpr double kScale = 0.37;

struct Sums {
  double loss = 0, z = 0;
  Vec token;
};

Sums Reference(const Vec& x, const Vec& w, const std::vector<int32_t>& labels, int64_t vocab) {
  Sums out;
  for (size_t t = 0; t < labels.size(); ++t) {
    out.token.push_back(0);
    if (labels[t] < 0) continue;
    double sum = 0, wanted = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      double logit = 0;
      for (size_t d = 0; d < kD; ++d) logit += x[t * kD + d] * w[static_cast<size_t>(v) * kD + d];
      sum += std::exp(logit);
      if (v == labels[t]) wanted = logit;
    }
    const double lse = std::log(sum);
    out.token.back() = lse - wanted;
    out.loss += lse - wanted;
    out.z += kZLoss * lse * lse;
  }
  return out;
}

double LossSum(const ops::LinearCrossEntropyResult& result) {
  return ops::ReadLossSums(result.sums).loss;
}

struct Problem {
  Vec x, w;
  Tensor tx, tw, labels;
};

Problem Make(Context& ctx, DType dtype) {
  Problem p{Normal(kT * kD, 1, dtype), Normal(kV * kD, 2, dtype), {}, {}, {}};
  for (double& v : p.w) v *= 0.25;  // exact in every dtype; logits of a few units
  p.tx = FromVec(ctx, {kT, kD}, dtype, p.x);
  p.tw = FromVec(ctx, {kV, kD}, dtype, p.w);
  p.labels = IntTensor(ctx, kLabels);
  return p;
}

TEST(LinearCrossEntropyTest, MatchesReferenceAndFiniteDifferences) {
  for (const DType dtype : FloatDtypes()) {
    for (const int64_t chunk : {0, 1, 3}) {
      Context ctx = OpContext();
      Problem p = Make(ctx, dtype);
      const ops::LinearCrossEntropyOptions options{
          .chunk_tokens = chunk, .z_loss = kZLoss, .want_token_losses = true};
      const auto result = ops::LinearCrossEntropyForward(ctx, p.tx, p.tw, p.labels, options);
      const Sums expected = Reference(p.x, p.w, kLabels, kV);
      const double bound = dtype == DType::kF64 ? 1e-13 : 1e-6;  // logits are f32 also for bf16
      const ops::LossSums sums = ops::ReadLossSums(result.sums);
      EXPECT_EQ(sums.valid, 5);
      EXPECT_NEAR(sums.loss, expected.loss, bound * expected.loss);
      EXPECT_NEAR(sums.z_loss, expected.z, bound * expected.z);
      EXPECT_LE(RelRms(ToVec(result.token_losses), expected.token), bound);

      const Vec before = Normal(kV * kD, 4);
      Tensor dw = FromVec(ctx, {kV, kD}, AccumulatorOf(dtype), before);
      const Tensor dx =
          ops::LinearCrossEntropyBackward(ctx, result, p.tx, p.tw, p.labels, options, kScale, dw);
      const auto f = [&] {
        const Sums s = Reference(p.x, p.w, kLabels, kV);
        return kScale * (s.loss + s.z);
      };
      const Vec dx_expected = NumericGradient(p.x, f);
      const Vec dw_expected = NumericGradient(p.w, f);
      Vec dw_added = ToVec(dw);
      for (size_t i = 0; i < dw_added.size(); ++i) dw_added[i] -= before[i];
      // In bf16 dlogits and dx are rounded once each.
      EXPECT_LE(RelRms(ToVec(dx), dx_expected), std::max(1e-6, 1.5 * Bound(dtype, dx_expected)));
      EXPECT_LE(RelRms(dw_added, dw_expected), std::max(2e-6, Bound(dtype, dw_expected)));
    }
  }
}

// Gradients by their formula, over several blocks of words and several chunks of tokens, with
// labels at the ends of blocks, and tokens and a whole chunk without a label.
TEST(LinearCrossEntropyTest, GradientsOverBlocksOfWords) {
  constexpr int64_t kVocab = 2 * 4096 + 77, kTokens = 11;
  const std::vector<int32_t> labels = {0, 8268, 2756, 2757, -1, 5513, 5514, -1, -1, 4096, -1};
  for (const DType dtype : FloatDtypes()) {
    Context ctx = OpContext();
    const Vec x = Normal(kTokens * kD, 1, dtype);
    Vec w = Normal(kVocab * kD, 2, dtype);
    for (double& v : w) v *= 0.25;
    Vec dx(x.size()), dw = Normal(kVocab * kD, 3);
    const Tensor tx = FromVec(ctx, {kTokens, kD}, dtype, x), t = IntTensor(ctx, labels);
    const Tensor tw = FromVec(ctx, {kVocab, kD}, dtype, w);
    for (double& v : dw) v /= 1024;  // as small as what is added, whose rounding would show
    const Vec before = dw;
    for (size_t i = 0; i < labels.size(); ++i) {
      if (labels[i] < 0) continue;
      Vec logits(kVocab);
      double sum = 0;
      for (size_t v = 0; v < kVocab; ++v) {
        for (size_t d = 0; d < kD; ++d) logits[v] += x[i * kD + d] * w[v * kD + d];
        sum += std::exp(logits[v]);
      }
      const double lse = std::log(sum);
      for (size_t v = 0; v < kVocab; ++v) {
        const double p = std::exp(logits[v] - lse), label = v == static_cast<size_t>(labels[i]);
        const double g = kScale * (p * (1 + 2 * kZLoss * lse) - label);
        for (size_t d = 0; d < kD; ++d) {
          dx[i * kD + d] += g * w[v * kD + d];
          dw[v * kD + d] += g * x[i * kD + d];
        }
      }
    }
    for (const int64_t chunk : {0, 1}) {
      const ops::LinearCrossEntropyOptions options{.chunk_tokens = chunk, .z_loss = kZLoss};
      const auto saved = ops::LinearCrossEntropyForward(ctx, tx, tw, t, options);
      Tensor sums = FromVec(ctx, {kVocab, kD}, AccumulatorOf(dtype), before);
      const Vec got =
          ToVec(ops::LinearCrossEntropyBackward(ctx, saved, tx, tw, t, options, kScale, sums));
      EXPECT_LE(RelRms(got, dx), std::max(2e-6, 1.5 * Bound(dtype, dx))) << ToString(dtype);
      Vec change = ToVec(sums), expected = dw;
      for (size_t j = 0; j < change.size(); ++j) change[j] -= before[j], expected[j] -= before[j];
      EXPECT_LE(RelRms(change, expected), std::max(2e-6, Bound(dtype, expected)))
          << ToString(dtype);
    }
  }
}

TEST(LinearCrossEntropyTest, SameBitsForAnyThreads) {
  for (const DType dtype : FloatDtypes()) {
    ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
      constexpr int64_t kTokens = 150, kVocab = 1501;
      const Tensor x = FromVec(ctx, {kTokens, kD}, dtype, Normal(kTokens * kD, 1, dtype));
      const Tensor w = FromVec(ctx, {kVocab, kD}, dtype, Normal(kVocab * kD, 2, dtype));
      std::vector<int32_t> labels(kTokens);
      for (size_t t = 0; t < kTokens; ++t) labels[t] = static_cast<int32_t>(t * 977 % kVocab) - 1;
      const Tensor label = IntTensor(ctx, labels);
      const ops::LinearCrossEntropyOptions options{.chunk_tokens = 64, .z_loss = kZLoss};
      const auto result = ops::LinearCrossEntropyForward(ctx, x, w, label, options);
      Tensor dw = FromVec(ctx, {kVocab, kD}, AccumulatorOf(dtype), Normal(kVocab * kD, 3));
      const Tensor dx =
          ops::LinearCrossEntropyBackward(ctx, result, x, w, label, options, kScale, dw);
      return {result.lse, dx, dw, result.sums};
    });
  }
}

// The point of the op: a large vocabulary costs the logits of one chunk, never of all tokens.
TEST(LinearCrossEntropyTest, FullLogitsNeverExist) {
  constexpr int64_t kTokens = 2048, kVocab = 2000, kChunk = 64;
  Context ctx({.device = TestDevice(), .threads = 1});
  const Tensor x = FromVec(ctx, {kTokens, kD}, DType::kF32, Normal(kTokens * kD, 1));
  const Tensor w = FromVec(ctx, {kVocab, kD}, DType::kF32, Normal(kVocab * kD, 2));
  Tensor dw = ctx.Zeros({kVocab, kD}, DType::kF32);
  const Tensor labels = IntTensor(ctx, std::vector<int32_t>(kTokens, 3));
  Tensor product = ctx.Zeros({1, kVocab}, DType::kF32);
  ops::Gemm(ctx, x.Rows(0, 1), false, w, true, product);  // takes a library's workspace
  const size_t before = ctx.allocator().used_bytes();
  const ops::LinearCrossEntropyOptions options{.chunk_tokens = kChunk};
  const auto saved = ops::LinearCrossEntropyForward(ctx, x, w, labels, options);
  ops::LinearCrossEntropyBackward(ctx, saved, x, w, labels, options, 1, dw);
  EXPECT_LT(ctx.allocator().peak_bytes() - before, size_t{4} * kTokens * kVocab / 4);
  EXPECT_EQ(ops::AutoChunkTokens(32768, DeviceKind::kCpu) * 32768 * 4, int64_t{32} << 20);
  EXPECT_EQ(ops::AutoChunkTokens(10'000'000, DeviceKind::kCpu), 64);
  EXPECT_EQ(ops::AutoChunkTokens(128256, DeviceKind::kCuda), 2048);
  EXPECT_EQ(ops::AutoChunkTokens(10'000'000, DeviceKind::kCuda), 64);
}

TEST(LinearCrossEntropyTest, NoLabelsAndNoTokens) {
  for (const DType dtype : FloatDtypes()) {
    for (const int64_t tokens : {int64_t{0}, kT}) {
      Context ctx = OpContext();
      const Tensor x = FromVec(ctx, {tokens, kD}, dtype, Normal(tokens * kD, 1, dtype));
      const Tensor w = FromVec(ctx, {kV, kD}, dtype, Normal(kV * kD, 2, dtype));
      const Tensor labels = IntTensor(ctx, std::vector<int32_t>(static_cast<size_t>(tokens), -1));
      const Vec before = Normal(kV * kD, 3);
      Tensor dw = FromVec(ctx, {kV, kD}, AccumulatorOf(dtype), before);
      const auto result = ops::LinearCrossEntropyForward(ctx, x, w, labels, {.z_loss = kZLoss});
      const Tensor dx = ops::LinearCrossEntropyBackward(ctx, result, x, w, labels, {}, 1, dw);
      EXPECT_EQ(ToVec(result.sums), Vec(3));
      EXPECT_FALSE(result.token_losses.defined());
      EXPECT_EQ(ToVec(result.lse), Vec(static_cast<size_t>(tokens)));
      EXPECT_EQ(ToVec(dx), Vec(static_cast<size_t>(tokens * kD)));
      EXPECT_EQ(ToVec(dw), before);
    }
  }
}

TEST(LinearCrossEntropyTest, LargeLogitsDoNotOverflow) {
  Context ctx = OpContext();
  Problem p = Make(ctx, DType::kF32);
  for (double& v : p.x) v *= 1000;
  const auto result = ops::LinearCrossEntropyForward(ctx, FromVec(ctx, {kT, kD}, DType::kF32, p.x),
                                                     p.tw, p.labels, {});
  EXPECT_TRUE(std::isfinite(LossSum(result)));
  EXPECT_GT(LossSum(result), 100);
}

TEST(LinearCrossEntropyTest, ALogitThatIsNotFiniteShowsInTheLoss) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Context ctx = OpContext();
    Problem p = Make(ctx, DType::kF32);
    p.x[6 * kD + 4] = bad;
    const auto result = ops::LinearCrossEntropyForward(
        ctx, FromVec(ctx, {kT, kD}, DType::kF32, p.x), p.tw, p.labels, {});
    EXPECT_FALSE(std::isfinite(LossSum(result)));
  }
}

// One row of w that is no token's label gives every token a logit of the same infinite sign; the
// f32 product of two large finite values does too.
TEST(LinearCrossEntropyTest, AWeightThatIsNotFiniteShowsInTheLoss) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const double bad : {-kInfinity, kInfinity, -3e38, 3e38}) {
    for (const DType dtype : FloatDtypes()) {
      if (dtype == DType::kF64 && std::isfinite(bad)) continue;
      for (const size_t row : {size_t{0}, size_t{9}, size_t{36}}) {
        Context ctx = OpContext();
        Problem p = Make(ctx, dtype);
        for (size_t t = 0; t < kT; ++t) p.x[t * kD + 4] = 64;
        p.w[row * kD + 4] = bad;
        const auto result = ops::LinearCrossEntropyForward(ctx, FromVec(ctx, {kT, kD}, dtype, p.x),
                                                           FromVec(ctx, {kV, kD}, dtype, p.w),
                                                           p.labels, {.want_token_losses = true});
        EXPECT_FALSE(std::isfinite(LossSum(result))) << bad << " in row " << row;
        const Vec losses = ToVec(result.token_losses);
        for (size_t t = 0; t < kT; ++t) {
          EXPECT_EQ(std::isfinite(losses[t]), kLabels[t] < 0) << bad << " token " << t;
        }
      }
    }
  }
}

// The same where one thread meets the bad logit among good ones.
TEST(LinearCrossEntropyTest, AnInfiniteLogitAmongManyShowsInTheLoss) {
  for (const int64_t vocab : {3100, 3101}) {
    for (const double bad :
         {-std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()}) {
      for (const int64_t row : {int64_t{0}, int64_t{1500}, vocab - 1}) {
        Context ctx = OpContext();
        Vec w = Normal(vocab * 2, 1);
        w[static_cast<size_t>(2 * row)] = bad;
        const auto result = ops::LinearCrossEntropyForward(
            ctx, FromVec(ctx, {1, 2}, DType::kF32, {1, 1}),
            FromVec(ctx, {vocab, 2}, DType::kF32, w), IntTensor(ctx, {7}), {});
        EXPECT_FALSE(std::isfinite(LossSum(result))) << bad << " " << row << " of " << vocab;
      }
    }
  }
}

// A GPU cannot throw for a label; it must not read outside the logits, and must not go unnoticed.
TEST(LinearCrossEntropyTest, LabelsOutOfRangeOnAGpuGiveNan) {
  if (!OnCuda()) return;
  for (const int32_t bad : {-2, 37, 1 << 30, std::numeric_limits<int32_t>::min()}) {
    Context ctx = OpContext();
    Problem p = Make(ctx, DType::kBF16);
    std::vector<int32_t> labels = kLabels;
    labels[3] = bad;
    const Tensor t = IntTensor(ctx, labels);
    const auto result =
        ops::LinearCrossEntropyForward(ctx, p.tx, p.tw, t, {.want_token_losses = true});
    EXPECT_TRUE(std::isnan(LossSum(result)));
    const Vec losses = ToVec(result.token_losses);
    for (size_t i = 0; i < losses.size(); ++i) EXPECT_EQ(std::isnan(losses[i]), i == 3) << i;
    Tensor dw;
    const Vec dx = ToVec(ops::LinearCrossEntropyBackward(ctx, result, p.tx, p.tw, t, {}, 1, dw));
    for (size_t i = 0; i < dx.size(); ++i) EXPECT_EQ(std::isnan(dx[i]), i / kD == 3) << i;
  }
}

// A vocabulary of several blocks, of whole packs or not; more tokens than a block of the sums.
TEST(LinearCrossEntropyTest, ManyTokensAndAWideVocabulary) {
  for (const int64_t vocab : {4096 + 1024, 4096 + 1027}) {
    Context ctx = OpContext();
    constexpr int64_t kTokens = 3;
    const Vec x = Normal(kTokens * kD, 1);
    Vec w = Normal(vocab * kD, 2);
    for (double& v : w) v *= 0.25;
    const std::vector<int32_t> labels = {0, static_cast<int32_t>(vocab - 1), 4096};
    const Sums expected = Reference(x, w, labels, vocab);
    const Tensor tx = FromVec(ctx, {kTokens, kD}, DType::kF32, x);
    const Tensor tw = FromVec(ctx, {vocab, kD}, DType::kF32, w), t = IntTensor(ctx, labels);
    const auto result = ops::LinearCrossEntropyForward(ctx, tx, tw, t, {.chunk_tokens = 2});
    EXPECT_NEAR(LossSum(result), expected.loss, 1e-6 * expected.loss);
    // The gradients of the logits of a token add up to zero: so does dw over the vocabulary.
    Tensor dw = ctx.Zeros({vocab, kD}, DType::kF32);
    ops::LinearCrossEntropyBackward(ctx, result, tx, tw, t, {.chunk_tokens = 2}, 1, dw);
    const Vec g = ToVec(dw);
    Vec total(kD), label_row(kD);
    for (size_t i = 0; i < g.size(); ++i) total[i % kD] += g[i];
    for (const double v : total) EXPECT_NEAR(v, 0, 1e-5);
    EXPECT_GT(RelMax(Vec(g.end() - kD, g.end()), Vec(kD)), 0.1);
  }
  Context ctx = OpContext();
  constexpr int64_t kMany = 4096 * 2 + 3;
  std::vector<int32_t> labels(kMany);
  for (size_t t = 0; t < kMany; ++t) labels[t] = t % 41 == 0 ? 0 : -1;
  const Tensor zeros = ctx.Zeros({kMany, 2}, DType::kF32), w = ctx.Zeros({2, 2}, DType::kF32);
  const auto sums = ops::ReadLossSums(
      ops::LinearCrossEntropyForward(ctx, zeros, w, IntTensor(ctx, labels), {.z_loss = 1}).sums);
  EXPECT_EQ(sums.valid, (kMany + 40) / 41);
  EXPECT_NEAR(sums.loss, static_cast<double>(sums.valid) * std::log(2), 1e-3);
  EXPECT_NEAR(sums.z_loss, static_cast<double>(sums.valid) * std::log(2) * std::log(2), 1e-3);
}

TEST(LinearCrossEntropyTest, NamesTheLabelThatIsOutOfRange) {
  if (OnCuda()) return;
  Context ctx = OpContext();
  Problem p = Make(ctx, DType::kF32);
  for (const int32_t bad : {-2, 37}) {
    std::vector<int32_t> labels = kLabels;
    labels[3] = bad;
    try {
      ops::LinearCrossEntropyForward(ctx, p.tx, p.tw, IntTensor(ctx, labels), {});
      ADD_FAILURE() << "label " << bad << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(Str("token 3 has label ", bad)), std::string::npos)
          << e.what();
    }
  }
  EXPECT_THROW(ops::LinearCrossEntropyForward(ctx, p.tx, p.tw, p.labels, {.z_loss = -1}),
               InvalidArgument);
  EXPECT_THROW(ops::LinearCrossEntropyForward(ctx, p.tx, p.tw, IntTensor(ctx, {1}), {}),
               InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
