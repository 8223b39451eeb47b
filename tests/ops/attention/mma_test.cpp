// mma_bf16 where it differs from the other implementations: tiles of pairs of heads, padded head
// sizes, lists longer than what is held at a time. Against naive f64 attention.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr const char* kName = "mma_bf16";

// Probabilities and score gradients are rounded to bf16 once, which is off by 2^-9 / sqrt(3) in the
// mean; the sums over keys average some of it out. Worst of all that a call computes.
constexpr double kRmsError = 3e-3;

Vec Finite(Vec lse) {
  for (double& x : lse) x = std::isinf(x) ? -1e3 : x;
  return lse;
}

double WorstRms(const AttentionRun& run, const AttentionRun& want) {
  double worst = RelRms(run.o, want.o);
  worst = std::max(worst, RelRms(run.dv, want.dv));
  worst = std::max(worst, 100 * RelRms(Finite(run.lse), Finite(want.lse)));
  // Where rows see one key each, dq and dk cancel to nothing.
  const auto gradient = [](Vec a, Vec b) {
    a.push_back(1);
    b.push_back(1);
    return RelRms(a, b);
  };
  worst = std::max(worst, gradient(run.dq, want.dq));
  return std::max(worst, gradient(run.dk, want.dk));
}

void CheckOne(const AttentionCase& c) {
  SCOPED_TRACE(c.Name());
  Context ctx = OpContext(1);
  AttentionInputs in = MakeInputs(c);
  if (c.sigmoid()) {  // weights are small, and gradients are added to 0.5
    for (double& x : in.d_out) x *= 256;
  }
  const AttentionRun run = RunAttention(ctx, c, in, kName);
  EXPECT_EQ(run.implementation, kName);
  EXPECT_LT(WorstRms(run, RunNaive(c, in)), kRmsError);
}

void Check(AttentionCase c) {
  for (const ops::Normalization normalization : kNormalizations) {
    c.normalization = normalization;
    CheckOne(c);
  }
}

std::shared_ptr<const ops::Documents> OneRow(int64_t tokens) {
  return std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, tokens));
}

// bf16 everywhere; the shard is the whole micro-batch unless the test sets it.
AttentionCase Case(const ops::AttentionPattern& pattern,
                   std::shared_ptr<const ops::Documents> documents) {
  const auto all = ops::BlockList::All(*documents);
  AttentionCase c{.mask_case = {.pattern = {pattern.ToString(), pattern},
                                .documents = {"documents", std::move(documents)},
                                .shard = {"whole", all, all},
                                .kv_heads = 1},
                  .dtype = DType::kBF16};
  return c;
}

class MmaTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(OnCuda()) << "run with --device=cuda"; }
};

TEST_F(MmaTest, EveryHeadSize) {
  for (int64_t dim = 8; dim <= 256; dim += 8) {
    AttentionCase c = Case(ops::AttentionPattern::Window(50, 2), OneRow(100));
    c.dim = dim;
    c.group = 1 + dim / 8 % 3;
    c.seed = static_cast<uint64_t>(dim);
    Check(c);
  }
}

TEST_F(MmaTest, GroupsOfAnySize) {
  for (const int64_t group : {1, 2, 3, 4, 5, 8}) {
    for (const int64_t dim : {64, 136}) {
      AttentionCase c = Case(ops::AttentionPattern::Causal(), OneRow(80));
      c.mask_case.kv_heads = group < 4 ? 2 : 1;
      c.group = group;
      c.dim = dim;
      c.with_dlse = group % 2 == 0;
      c.seed = static_cast<uint64_t>(group * 1000 + dim);
      Check(c);
    }
  }
}

// One query block against 135 key blocks, and one key block against as many query blocks.
TEST_F(MmaTest, ListsLongerThanWhatIsHeld) {
  const auto documents = OneRow(135 * 64 - 7);
  std::vector<int32_t> many(135);
  std::iota(many.begin(), many.end(), 0);
  for (const ops::AttentionPattern& pattern :
       {ops::AttentionPattern::Causal(), ops::AttentionPattern::S2({.block_size = 32,
                                         .local_blocks = 3,
                                         .stride_blocks = 3,
                                         .allow_incomplete_coverage = true})}) {
    AttentionCase c = Case(pattern, documents);
    c.dim = 32;
    c.mask_case.shard = {"row", ops::BlockList::FromIds(*documents, {134}),
                         ops::BlockList::FromIds(*documents, many)};
    Check(c);
    c.group = 2;
    c.mask_case.shard = {"column", ops::BlockList::FromIds(*documents, many),
                         ops::BlockList::FromIds(*documents, {0})};
    Check(c);
  }
}

// Query blocks out of order, a short one among them: local offsets are odd then.
TEST_F(MmaTest, PermutedShards) {
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(201, {{70, 201}, {5, 150, 201}}));
  AttentionCase c = Case(ops::AttentionPattern::Window(90, 3), documents);
  c.mask_case.kv_heads = 2;
  c.group = 2;
  c.mask_case.shard = {"permuted", ops::BlockList::FromIds(*documents, {3, 6, 7, 0, 2, 5}),
                       ops::BlockList::FromIds(*documents, {4, 3, 0, 6, 1})};
  for (const int64_t dim : {40, 128}) {
    c.dim = dim;
    Check(c);
  }
}

// The running maximum is that of the scaled scores, whatever the sign of the scale.
TEST_F(MmaTest, NegativeScale) {
  AttentionCase c = Case(ops::AttentionPattern::Causal(), OneRow(150));
  c.group = 2;
  for (const double scale : {-0.125, -2.0, 1e-30}) {
    c.scale = scale;
    c.dim = 64;
    Check(c);
    c.dim = 192;
    Check(c);
  }
}

// The first key of every row weighs all but everything, and 4096 key blocks (all in the same
// memory) follow: on the way the weight of the first may not drift.
TEST_F(MmaTest, LongRowsKeepTheWeightOfTheirMaximum) {
  constexpr int64_t kKeyBlocks = 4097, kDim = 32, kRows = 64;
  constexpr double kScale = 0.9;  // of which no score is a short number
  Context ctx = OpContext(1);
  const auto documents = OneRow(kKeyBlocks * kRows);
  const auto mask = ops::BlockMask::Build(ops::AttentionPattern::Full(), 1, documents,
                                          ops::BlockList::FromIds(*documents, {0}),
                                          ops::BlockList::All(*documents));
  Vec q = Normal(kRows * kDim, 1, DType::kBF16), k = Normal(2 * kRows * kDim, 2, DType::kBF16);
  for (double& x : q) x = std::abs(x);
  for (double& x : k) x = -2 * std::abs(x);
  std::fill_n(k.begin(), kDim, 1.0);
  std::vector<int64_t> offsets(kKeyBlocks, kRows * kDim);
  offsets[0] = 0;
  const Tensor keys = FromVec(ctx, {2 * kRows, 1, kDim}, DType::kBF16, k);
  const ops::KvView kv{.k = keys,
                       .v = keys,
                       .head_dim = kDim,
                       .table = std::make_shared<const ops::KvTable>(1, kDim, 0, offsets)};
  const auto result = ops::AttentionForward(ctx, FromVec(ctx, {kRows, 1, kDim}, DType::kBF16, q),
                                            kv, *mask, {.scale = kScale, .implementation = kName});
  const Vec lse = ToVec(result.lse), o = ToVec(result.o);
  for (size_t i = 0; i < kRows; ++i) {
    double sum = 0;
    for (size_t j = 0; j < 2 * kRows; ++j) {
      const double s = std::inner_product(&q[i * kDim], &q[(i + 1) * kDim], &k[j * kDim], 0.0);
      sum += std::exp(kScale * s) * (j < kRows ? 1.0 : static_cast<double>(kKeyBlocks - 1));
    }
    EXPECT_NEAR(lse[i], std::log(sum), 5e-6) << "row " << i;
    EXPECT_NEAR(o[i * kDim], 1, 1e-5) << "row " << i;
  }
}

// One key scores 0 and all others -1, where the weight e^-1 is 1.9e-3 away from the nearest bf16:
// what the values are multiplied by has to sum to 1 all the same, wherever the maximum comes.
TEST_F(MmaTest, RoundedWeightsSumToOne) {
  Context ctx = OpContext(1);
  for (const int64_t tokens : {65, 190, 1000}) {
    for (const int64_t dim : {32, 128, 192}) {
      for (const bool last : {false, true}) {
        const auto documents = OneRow(tokens);
        const auto all = ops::BlockList::All(*documents);
        const auto first_block = ops::BlockList::FromIds(*documents, {0});
        const auto mask =
            ops::BlockMask::Build(ops::AttentionPattern::Full(), 1, documents, first_block, all);
        Vec q(static_cast<size_t>(64 * 3 * dim)), k(static_cast<size_t>(tokens * dim));
        for (size_t i = 0; i < q.size(); i += static_cast<size_t>(dim)) q[i] = 1;
        for (size_t i = 0; i < k.size(); i += static_cast<size_t>(dim)) k[i] = -1;
        k[last ? k.size() - static_cast<size_t>(dim) : 0] = 0;
        const Shape kv_shape{tokens, 1, dim};
        const auto kv =
            ops::MakeKvView(FromVec(ctx, kv_shape, DType::kBF16, k),
                            FromVec(ctx, kv_shape, DType::kBF16, Vec(k.size(), 1.0)), *mask);
        const auto result = ops::AttentionForward(ctx, FromVec(ctx, {64, 3, dim}, DType::kBF16, q),
                                                  kv, *mask, {.scale = 1, .implementation = kName});
        SCOPED_TRACE(Str("T ", tokens, " D ", dim, last ? " last" : " first"));
        EXPECT_LT(RelMax(ToVec(result.o), Vec(q.size(), 1.0)), 1e-5);
        const double sum = 1 + static_cast<double>(tokens - 1) * std::exp(-1.0);
        EXPECT_LT(RelMax(ToVec(result.lse), Vec(64 * 3, std::log(sum))), 1e-6);
      }
    }
  }
}

// Sigmoid attention of plain tensors over a whole row, gradients from 0.
AttentionRun RunSigmoid(Context& ctx, const ops::BlockMask& mask, const AttentionInputs& in,
                        double bias) {
  const int64_t tokens = in.problem.queries.tokens(), dim = in.problem.dim;
  const Shape shape{tokens, in.problem.heads, dim}, kv_shape{tokens, in.problem.kv_heads, dim};
  const auto tensor = [&](const Shape& of, const Vec& values) {
    return FromVec(ctx, of, DType::kBF16, values);
  };
  const Tensor q = tensor(shape, in.q);
  const auto kv = ops::MakeKvView(tensor(kv_shape, in.k), tensor(kv_shape, in.v), mask);
  const ops::AttentionOptions options{.scale = in.problem.scale,
                                      .implementation = kName,
                                      .normalization = ops::Normalization::kSigmoid,
                                      .bias = bias};
  const auto result = ops::AttentionForward(ctx, q, kv, mask, options);
  EXPECT_FALSE(result.lse.defined());
  Tensor dq = ctx.Zeros(shape, DType::kF32);
  const Tensor dk = ctx.Zeros(kv_shape, DType::kF32), dv = ctx.Zeros(kv_shape, DType::kF32);
  ops::AttentionBackward(ctx, tensor(shape, in.d_out), q, kv, {}, {}, mask, dq,
                         ops::MakeKvGradView(dk, dv, mask), options);
  return {.o = ToVec(result.o),
          .lse = {},
          .dq = ToVec(dq),
          .dk = ToVec(dk),
          .dv = ToVec(dv),
          .implementation = result.implementation};
}

// Weights next to 0 and next to 1, where 1 - p is far below the spacing of numbers at 1.
TEST_F(MmaTest, SigmoidOfLargeBias) {
  Context ctx = OpContext(1);
  AttentionCase c = Case(ops::AttentionPattern::Causal(), OneRow(150));
  c.group = 3;
  for (const double bias : {-60.0, -20.0, 14.0, 40.0}) {
    for (const int64_t dim : {64, 192}) {
      SCOPED_TRACE(Str("bias ", bias, " D ", dim));
      c.dim = dim;
      const AttentionInputs in = MakeInputs(c);
      const AttentionRun run = RunSigmoid(ctx, *BuildMask(c.mask_case), in, bias);
      const NaiveGradients grads =
          NaiveSigmoidBackward(in.problem, bias, in.q, in.k, in.v, in.d_out);
      EXPECT_LT(RelRms(run.o, NaiveSigmoidForward(in.problem, bias, in.q, in.k, in.v)), kRmsError);
      EXPECT_LT(RelRms(run.dq, grads.dq), kRmsError);
      EXPECT_LT(RelRms(run.dk, grads.dk), kRmsError);
      EXPECT_LT(RelRms(run.dv, grads.dv), kRmsError);
    }
  }
}

// Weights of exactly 0 and 1: o and dv are plain sums, and no score has a gradient.
TEST_F(MmaTest, SigmoidOfScoresBeyondTheExponent) {
  Context ctx = OpContext(1);
  AttentionCase c = Case(ops::AttentionPattern::Full(), OneRow(100));
  c.dim = 16;
  c.scale = 1;
  AttentionInputs in = MakeInputs(c);
  Vec o(in.q.size()), dv(in.q.size());
  for (size_t i = 0; i < in.q.size(); ++i) {
    const size_t token = i / 16;
    in.q[i] = i % 16 == 0 ? 1 : 0;
    in.k[i] = token % 3 == 0 ? 4000 : -4000;
    in.v[i] = static_cast<double>(token % 5) + 1;
    in.d_out[i] = static_cast<double>(token % 4) - 1;
  }
  for (size_t i = 0; i < o.size(); ++i) {
    for (size_t token = 0; token < 100; ++token) {
      if (token % 3 == 0) o[i] += in.v[token * 16];
      if (i / 16 % 3 == 0) dv[i] += in.d_out[token * 16];
    }
  }
  const AttentionRun run = RunSigmoid(ctx, *BuildMask(c.mask_case), in, -1);
  EXPECT_EQ(run.o, o);
  EXPECT_EQ(run.dv, dv);
  EXPECT_EQ(run.dq, Vec(in.q.size()));
  EXPECT_EQ(run.dk, Vec(in.k.size()));
}

// Scores of padding are 0 and those of real keys far below: the padding may not take part.
TEST_F(MmaTest, ShortBlocksBesideLowScores) {
  const auto documents = OneRow(70);
  AttentionCase c = Case(ops::AttentionPattern::Full(), documents);
  c.dim = 16;
  c.group = 2;
  c.scale = 60;
  AttentionInputs in = MakeInputs(c);
  for (double& x : in.q) x = std::abs(x);
  for (double& x : in.k) x = -std::abs(x);
  Context ctx = OpContext(1);
  const AttentionRun run = RunAttention(ctx, c, in, kName);
  const AttentionRun want = RunNaive(c, in);
  EXPECT_LT(*std::max_element(want.lse.begin(), want.lse.end()), -128);
  EXPECT_LT(RelRms(run.lse, want.lse), 1e-5);
  EXPECT_LT(WorstRms(run, want), 1e-2);  // scores of 1000 carry 1e-4 in f32
}

// d_out in f32 is rounded to bf16, and nothing else changes.
TEST_F(MmaTest, GradientOfOutputInF32) {
  Context ctx = OpContext(1);
  const auto documents = OneRow(100);
  const auto all = ops::BlockList::All(*documents);
  const auto mask = ops::BlockMask::Build(ops::AttentionPattern::Causal(), 2, documents, all, all);
  const Shape shape{100, 4, 24}, kv_shape{100, 2, 24};
  const Vec d_out = Normal(100 * 4 * 24, 3);
  const Tensor q = FromVec(ctx, shape, DType::kBF16, Normal(100 * 4 * 24, 1));
  const Tensor k = FromVec(ctx, kv_shape, DType::kBF16, Normal(100 * 2 * 24, 2));
  const auto kv = ops::MakeKvView(k, k, *mask);
  const ops::AttentionOptions options{.implementation = kName};
  const auto forward = ops::AttentionForward(ctx, q, kv, *mask, options);
  const Tensor delta = FromVec(ctx, {100, 4}, DType::kF32, Normal(400, 4));
  const auto backward = [&](DType dtype) {
    Tensor dq = ctx.Zeros(shape, DType::kF32);
    const auto dkv = ops::MakeKvGradView(ctx.Zeros(kv_shape, DType::kF32),
                                         ctx.Zeros(kv_shape, DType::kF32), *mask);
    ops::AttentionBackward(ctx, FromVec(ctx, shape, dtype, d_out), q, kv, forward.lse, delta, *mask,
                           dq, dkv, options);
    return std::vector<Tensor>{dq, dkv.dk, dkv.dv};
  };
  const std::vector<Tensor> wide = backward(DType::kF32), narrow = backward(DType::kBF16);
  for (size_t i = 0; i < wide.size(); ++i) {
    EXPECT_TRUE(SameBits(wide[i], narrow[i])) << i;
    EXPECT_GT(RelRms(ToVec(wide[i]), Vec(static_cast<size_t>(wide[i].numel()))), 0.5) << i;
  }
}

TEST_F(MmaTest, RepeatsBitForBit) {
  AttentionCase c = Case(ops::AttentionPattern::Causal(), OneRow(200));
  c.group = 3;
  c.dim = 80;
  const AttentionInputs in = MakeInputs(c);
  Context ctx = OpContext(1);
  for (const ops::Normalization normalization : kNormalizations) {
    c.normalization = normalization;
    const AttentionRun first = RunAttention(ctx, c, in, kName);
    for (int i = 0; i < 3; ++i) {
      const AttentionRun again = RunAttention(ctx, c, in, kName);
      EXPECT_EQ(again.o, first.o);
      EXPECT_EQ(again.lse, first.lse);
      EXPECT_EQ(again.dq, first.dq);
      EXPECT_EQ(again.dk, first.dk);
      EXPECT_EQ(again.dv, first.dv);
    }
  }
}

}  // namespace
}  // namespace longspan::test
