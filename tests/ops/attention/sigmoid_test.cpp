// Sigmoid attention: every implementation against naive f64 sums, over patterns x documents x
// shards, and what it has of its own: a bias, weights that need not add up to 1, no row statistics.
// Merging of parts, threads, refusals, NaN and the error of bf16 operands: the tests of those.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using ops::AttentionPattern;
using ops::PatternKind;

constexpr int64_t kDims[] = {8, 40, 64, 80, 128, 256};
constexpr int64_t kSmallDims[] = {8, 40};
constexpr int64_t kGroups[] = {1, 2, 4};
constexpr bool kBools[] = {false, true};
constexpr double kScales[] = {0, 0, 0.3};  // 0: the default
constexpr std::optional<double> kBiases[] = {std::nullopt, std::nullopt, -1.5, 0.75};

// attention_threads_test varies the number.
Context OneThread() { return OpContext(1); }

AttentionCase CaseOf(NamedPattern pattern, int64_t tokens, std::vector<int64_t> ends,
                     int64_t kv_heads) {
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(tokens, {std::move(ends)}));
  const auto all = ops::BlockList::All(*documents);
  return {.mask_case = {.pattern = std::move(pattern),
                        .documents = {Str(tokens, " tokens"), documents},
                        .shard = {"whole", all, all},
                        .kv_heads = kv_heads},
          .normalization = ops::Normalization::kSigmoid};
}
AttentionCase FullCase(int64_t tokens) {
  return CaseOf({"full", AttentionPattern::Full()}, tokens, {tokens}, 1);
}

// Calls check(run, tolerance) for all implementations that take the case; there is one at least.
template <class Check>
void ForEachRun(Context& ctx, const AttentionCase& c, const AttentionInputs& in,
                const Check& check) {
  const std::vector<std::string> names = ImplementationsFor(ctx, c);
  ASSERT_FALSE(names.empty()) << c.Name();
  for (const std::string& name : names) {
    SCOPED_TRACE(Str(name, " ", c.Name()));
    const AttentionRun run = RunAttention(ctx, c, in, name);
    EXPECT_EQ(run.implementation, name);
    EXPECT_TRUE(run.lse.empty());
    check(run, Tolerance(name, c.dtype));
  }
}

void ExpectClose(const AttentionRun& run, const AttentionRun& want, double tolerance) {
  EXPECT_LT(RelMax(run.o, want.o), tolerance);
  EXPECT_LT(RelMax(run.dq, want.dq), tolerance);
  EXPECT_LT(RelMax(run.dk, want.dk), tolerance);
  EXPECT_LT(RelMax(run.dv, want.dv), tolerance);
}

void Check(Context& ctx, const AttentionCase& c) {
  AttentionInputs in = MakeInputs(c);
  // Weights are near 1 / T; gradients must not be lost beside what they are added to.
  for (double& x : in.d_out) x *= 256;
  const AttentionRun want = RunNaive(c, in);
  ForEachRun(ctx, c, in,
             [&](const AttentionRun& run, double tolerance) { ExpectClose(run, want, tolerance); });
}

// ---- the formula -----------------------------------------------------------------------------

TEST(SigmoidTest, AllImplementationsMatchNaiveOnSampledMasks) {
  Context ctx = OneThread();
  std::vector<MaskCase> cases = SampleMaskCases(400, 21);
  const std::set<PatternKind> needed = {PatternKind::kFull, PatternKind::kCausal,
                                        PatternKind::kWindow, PatternKind::kS2,
                                        PatternKind::kRandomBlocks};
  std::erase_if(cases, [&](const MaskCase& c) {
    return c.documents.documents->tokens() > 800 ||  // the naive sums are quadratic
           (OnCuda() && !needed.contains(c.pattern.pattern.kind));
  });
  cases.resize(OnCuda() ? 30 : 100);  // the emulated device is slow
  std::set<PatternKind> missing = needed;
  size_t with_empty_rows = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    const bool large = cases[i].documents.documents->tokens() > 300;
    Draws draw(500 + i);
    AttentionCase c{.mask_case = cases[i]};
    c.normalization = ops::Normalization::kSigmoid;
    c.dtype = draw.Of(FloatDtypes());
    c.group = draw.Of(kGroups);
    c.dim = large ? draw.Of(kSmallDims) : draw.Of(kDims);
    c.aligned = draw.Of(kBools);
    c.scale = draw.Of(kScales);
    c.bias = draw.Of(kBiases);
    c.seed = 500 + i;
    Check(ctx, c);
    if (testing::Test::HasFailure()) return;
    missing.erase(cases[i].pattern.pattern.kind);
    with_empty_rows += cases[i].shard.name.starts_with("ring step");
  }
  EXPECT_TRUE(missing.empty());
  EXPECT_GT(with_empty_rows, 0u);
}

// Every head size and dtype at lengths that divide nothing, in packed documents.
TEST(SigmoidTest, OddLengthsAndHeadSizes) {
  Context ctx = OneThread();
  const NamedPattern patterns[] = {
      {"causal", AttentionPattern::Causal()},
      {"window", AttentionPattern::Window(40, 3)},
      {"s2", AttentionPattern::S2({.block_size = 16,
                                   .local_blocks = 1,
                                   .stride_blocks = 3,
                                   .head_offset = 1,
                                   .allow_incomplete_coverage = true})}};
  uint64_t seed = 1;
  for (const int64_t tokens : {1, 63, 65, 150}) {
    for (const int64_t dim : kDims) {
      for (const DType dtype : FloatDtypes()) {
        Draws draw(++seed);
        AttentionCase c = CaseOf(
            draw.Of(patterns), tokens,
            tokens > 70 ? std::vector<int64_t>{70, tokens} : std::vector<int64_t>{tokens}, 2);
        c.dtype = dtype;
        c.group = draw.Of(kGroups);
        c.dim = dim;
        c.aligned = draw.Of(kBools);
        c.bias = draw.Of(kBiases);
        c.seed = seed;
        Check(ctx, c);
      }
    }
  }
}

TEST(SigmoidTest, ReferenceGradientsMatchFiniteDifferences) {
  if (OnCuda()) return;  // f64 is for CPUs
  Context ctx = OneThread();
  AttentionCase c = CaseOf({"window", AttentionPattern::Window(3, 1)}, 11, {4, 11}, 2);
  c.dtype = DType::kF64;
  c.group = 2;
  c.dim = 5;
  c.bias = 0.4;
  AttentionInputs in = MakeInputs(c);
  const AttentionRun run = RunAttention(ctx, c, in, "reference");
  const auto loss = [&] { return Dot(in.d_out, RunAttention(ctx, c, in, "reference").o); };
  EXPECT_LT(RelMax(run.dq, NumericGradient(in.q, loss)), 1e-8);
  EXPECT_LT(RelMax(run.dk, NumericGradient(in.k, loss)), 1e-8);
  EXPECT_LT(RelMax(run.dv, NumericGradient(in.v, loss)), 1e-8);
}

// ---- the bias --------------------------------------------------------------------------------

// Minus the logarithm of the tokens of a row: not of the batch, nor of the keys of the mask.
TEST(SigmoidTest, DefaultBiasIsThatOfTheRowLength) {
  Context ctx = OneThread();
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(100, {{100}, {30, 100}}));
  const auto all = ops::BlockList::All(*documents);
  const Shape shape{200, 1, 16};
  for (const std::vector<int32_t>& key_ids : {std::vector<int32_t>{0, 1, 2, 3}, {1}}) {
    const auto keys = ops::BlockList::FromIds(*documents, key_ids);
    const auto mask = ops::BlockMask::Build(AttentionPattern::Causal(), 1, documents, all, keys);
    for (const DType dtype : FloatDtypes()) {
      const Tensor q = FromVec(ctx, shape, dtype, Normal(shape.numel(), 1, dtype));
      const Shape kv_shape{keys.tokens(), 1, 16};
      const auto kv =
          ops::MakeKvView(FromVec(ctx, kv_shape, dtype, Normal(kv_shape.numel(), 2, dtype)),
                          FromVec(ctx, kv_shape, dtype, Normal(kv_shape.numel(), 3, dtype)), keys);
      const ops::AttentionProblem problem{
          .dtype = dtype, .heads = 1, .kv_heads = 1, .head_dim = 16};
      for (const std::string& name : ImplementationsFor(ctx, problem)) {
        const auto forward = [&](std::optional<double> bias) {
          const ops::AttentionResult result =
              ops::AttentionForward(ctx, q, kv, *mask,
                                    {.implementation = name,
                                     .normalization = ops::Normalization::kSigmoid,
                                     .bias = bias});
          EXPECT_FALSE(result.lse.defined());
          return result.o;
        };
        EXPECT_TRUE(SameBits(forward({}), forward(-std::log(100.0)))) << name;
        EXPECT_FALSE(SameBits(forward({}), forward(-std::log(200.0)))) << name;
      }
    }
  }
}

// A bias that decides alone: all of the values, or nothing, and no gradient but that of the values.
TEST(SigmoidTest, HugeBiasesGiveEverythingOrNothing) {
  Context ctx = OneThread();
  for (const double bias : {-1000.0, 1000.0}) {
    for (const DType dtype : FloatDtypes()) {
      AttentionCase c = CaseOf({"causal", AttentionPattern::Causal()}, 150, {70, 150}, 1);
      c.dtype = dtype;
      c.dim = 16;
      c.bias = bias;
      const AttentionInputs in = MakeInputs(c);
      const AttentionRun want = RunNaive(c, in);
      ForEachRun(ctx, c, in, [&](const AttentionRun& run, double tolerance) {
        const Vec nothing_rows(run.o.size()), nothing_keys(run.dk.size());
        EXPECT_EQ(run.dq, nothing_rows);
        EXPECT_EQ(run.dk, nothing_keys);
        if (bias > 0) {
          EXPECT_LT(RelMax(run.o, want.o), tolerance);
          EXPECT_LT(RelMax(run.dv, want.dv), tolerance);
        } else {
          EXPECT_EQ(run.o, nothing_rows);
          EXPECT_EQ(run.dv, nothing_keys);
        }
      });
    }
  }
}

// ---- far from 0 ------------------------------------------------------------------------------

// Scores of exactly 200 and -200: weights of 1 and 0, to the last bit of f32.
TEST(SigmoidTest, ScoresOf200) {
  Context ctx = OneThread();
  for (const DType dtype : FloatDtypes()) {
    AttentionCase c = FullCase(130);
    c.dtype = dtype;
    c.dim = 8;
    c.scale = 1;
    AttentionInputs in = MakeInputs(c);
    for (size_t i = 0; i < in.q.size(); ++i) {
      in.q[i] = i % 8 == 0 ? (i % 24 == 0 ? -20 : 20) : 0;
      if (i % 8 == 0) in.k[i] = i % 5 == 0 ? -10 : 10;
    }
    in.problem.scale = 1;
    const AttentionRun want = RunNaive(c, in);
    ForEachRun(ctx, c, in, [&](const AttentionRun& run, double tolerance) {
      EXPECT_LT(RelMax(run.o, want.o), tolerance);
      EXPECT_LT(RelMax(run.dv, want.dv), tolerance);
      // e^-195 of what would be left.
      EXPECT_EQ(run.dq, Vec(run.dq.size()));
      EXPECT_EQ(run.dk, Vec(run.dk.size()));
    });
  }
}

// Scores of hundreds of either sign, and some near 0.
TEST(SigmoidTest, LargeScoresStayExact) {
  Context ctx = OneThread();
  for (const DType dtype : FloatDtypes()) {
    AttentionCase c = CaseOf({"window", AttentionPattern::Window(100, 3)}, 200, {200}, 1);
    c.dtype = dtype;
    c.dim = 8;
    c.scale = 40;
    const AttentionInputs in = MakeInputs(c);
    const AttentionRun want = RunNaive(c, in);
    ForEachRun(ctx, c, in, [&](const AttentionRun& run, double tolerance) {
      // In f32, scores near 500 carry 3e-5, and so do the weights of keys and all made from them.
      ExpectClose(run, want, dtype == DType::kF64 ? 1e-11 : std::max(1e-3, tolerance));
    });
  }
}

// p (1 - p) of weights just below 1, and weights far below those of any softmax, keep their
// relative precision. The gradient of the output is scaled so that the others are near 1.
TEST(SigmoidTest, SmallWeightsAndSmallComplementsArePrecise) {
  Context ctx = OneThread();
  constexpr int64_t kDim = 16;
  for (const double score : {14.0, -40.0}) {
    for (const DType dtype : FloatDtypes()) {
      AttentionCase c = FullCase(150);
      c.dtype = dtype;
      c.dim = kDim;
      c.scale = 1;
      c.bias = 0;
      AttentionInputs in = MakeInputs(c);
      for (double& q : in.q) q = 2 + q / 64;
      for (double& k : in.k) k = score / (2 * kDim) + k / 64;
      in.q = RoundedTo(dtype, in.q);
      in.k = RoundedTo(dtype, in.k);
      for (double& x : in.d_out) x = std::ldexp(x, score > 0 ? 20 : 57);
      in.problem.scale = 1;
      const AttentionRun want = RunNaive(c, in);
      ForEachRun(ctx, c, in, [&](const AttentionRun& run, double tolerance) {
        // In f32, scores near 40 carry 4e-6.
        const double allowed = dtype == DType::kF64 ? 1e-11 : std::max(5e-5, tolerance);
        EXPECT_LT(RelMax(run.o, want.o), allowed);
        EXPECT_LT(RelMax(run.dq, want.dq), allowed);
        EXPECT_LT(RelMax(run.dk, want.dk), allowed);
        EXPECT_LT(RelMax(run.dv, want.dv), allowed);
      });
    }
  }
}

}  // namespace
}  // namespace longspan::test
