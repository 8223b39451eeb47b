// Every implementation against naive f64 attention, over patterns x documents x shards.
#include "ops/attention/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <utility>

#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kDims[] = {8, 40, 64, 80, 128, 256};
constexpr int64_t kSmallDims[] = {8, 40};
constexpr int64_t kGroups[] = {1, 2, 4};
constexpr bool kBools[] = {false, true};
constexpr double kScales[] = {0, 0, 0, 0.3};  // 0: the default

// One thread: these tests are many tiny calls. attention_threads_test varies the number.
Context OneThread() { return OpContext(1); }

// lse with its infinities compared exactly and taken out.
Vec FiniteLse(const Vec& lse, const Vec& want) {
  Vec finite(lse.size());
  for (size_t i = 0; i < lse.size(); ++i) {
    EXPECT_EQ(std::isinf(lse[i]), std::isinf(want[i])) << "row " << i;
    finite[i] = std::isinf(want[i]) ? 0 : lse[i];
  }
  return finite;
}

// dq and dk hold d_out . v - delta, all of which cancels where a row sees one key: below 1 their
// error counts as it is.
double RelMaxAboveOne(Vec a, Vec b) {
  a.push_back(1);
  b.push_back(1);
  return RelMax(a, b);
}

// Largest error over all results, each relative to its tensor.
double WorstError(const AttentionRun& run, const NaiveOutput& out, const NaiveGradients& grads) {
  double worst = RelMax(run.o, out.o);
  worst = std::max(worst, RelMax(FiniteLse(run.lse, out.lse), FiniteLse(out.lse, out.lse)));
  worst = std::max(worst, RelMaxAboveOne(run.dq, grads.dq));
  worst = std::max(worst, RelMaxAboveOne(run.dk, grads.dk));
  return std::max(worst, RelMax(run.dv, grads.dv));
}

// Runs all implementations that accept the case.
void Check(Context& ctx, const AttentionCase& c) {
  SCOPED_TRACE(c.Name());
  const AttentionInputs in = MakeInputs(c);
  const NaiveOutput out = NaiveForward(in.problem, in.q, in.k, in.v);
  const NaiveGradients grads = NaiveBackward(in.problem, in.q, in.k, in.v, in.d_out, in.dlse);
  for (const std::string& name : ImplementationsFor(ctx, c)) {
    const AttentionRun run = RunAttention(ctx, c, in, name);
    EXPECT_EQ(run.implementation, name);
    EXPECT_LT(WorstError(run, out, grads), Tolerance(name, c.dtype)) << name;
  }
}

TEST(AttentionTest, AllImplementationsMatchNaiveOnSampledMasks) {
  Context ctx = OneThread();
  std::vector<MaskCase> cases = SampleMaskCases(400, 5);
  std::erase_if(cases, [](const MaskCase& c) {  // the naive matrices are quadratic
    return c.documents.documents->tokens() > 800 || c.shard.keys.size() == 0;
  });
  ASSERT_GT(cases.size(), 100u);
  cases.resize(OnCuda() ? 40 : 100);  // the emulated device is slow
  for (size_t i = 0; i < cases.size(); ++i) {
    const bool large = cases[i].documents.documents->tokens() > 300;
    Draws draw(100 + i);
    AttentionCase c{.mask_case = cases[i]};
    c.dtype = draw.Of(FloatDtypes());
    c.group = draw.Of(kGroups);
    c.dim = large ? draw.Of(kSmallDims) : draw.Of(kDims);  // the naive gradients take their time
    c.with_dlse = draw.Of(kBools);
    c.aligned = draw.Of(kBools);
    c.scale = draw.Of(kScales);
    c.seed = 100 + i;
    Check(ctx, c);
    if (testing::Test::HasFailure()) return;
  }
}

// Every head size, group and dtype at lengths that divide nothing.
TEST(AttentionTest, OddLengthsAndHeadSizes) {
  Context ctx = OneThread();
  const NamedPattern patterns[] = {
      {"causal", ops::AttentionPattern::Causal()},
      {"window", ops::AttentionPattern::Window(40, 3)},
      {"s2", ops::AttentionPattern::S2({.block_size = 16,
                                        .local_blocks = 1,
                                        .stride_blocks = 3,
                                        .head_offset = 1,
                                        .allow_incomplete_coverage = true})}};
  uint64_t seed = 1;
  for (const int64_t tokens : {1, 63, 65, 150}) {
    const auto documents = std::make_shared<ops::Documents>(ops::Documents::FromEnds(
        tokens, {tokens > 70 ? std::vector<int64_t>{70, tokens} : std::vector<int64_t>{tokens}}));
    const auto all = ops::BlockList::All(*documents);
    for (const int64_t dim : kDims) {
      for (const DType dtype : FloatDtypes()) {
        for (const int64_t group : kGroups) {
          Draws draw(++seed);
          if (OnCuda() && draw.Of(kGroups) != group) continue;  // a third of them
          AttentionCase c{.mask_case = {.pattern = draw.Of(patterns),
                                        .documents = {Str(tokens, " tokens"), documents},
                                        .shard = {"whole", all, all},
                                        .kv_heads = group == 4 ? 1 : 2},
                          .dtype = dtype,
                          .group = group,
                          .dim = dim,
                          .with_dlse = draw.Of(kBools),
                          .aligned = draw.Of(kBools),
                          .seed = seed};
          Check(ctx, c);
        }
      }
    }
  }
}

// Scores far apart: the running maximum must be followed, and exp must not overflow or turn into
// NaN where a row's first blocks weigh nothing.
TEST(AttentionTest, LargeScoresStayExact) {
  Context ctx = OneThread();
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, 200));
  const auto all = ops::BlockList::All(*documents);
  AttentionCase c{.mask_case = {.pattern = {"window", ops::AttentionPattern::Window(100, 3)},
                                .documents = {"one", documents},
                                .shard = {"whole", all, all},
                                .kv_heads = 1},
                  .dim = 8,
                  .scale = 40};
  for (const DType dtype : FloatDtypes()) {
    c.dtype = dtype;
    const AttentionInputs in = MakeInputs(c);
    const NaiveOutput out = NaiveForward(in.problem, in.q, in.k, in.v);
    const NaiveGradients grads = NaiveBackward(in.problem, in.q, in.k, in.v, in.d_out, in.dlse);
    for (const std::string& name : ImplementationsFor(ctx, c)) {
      // In f32, scores near 500 carry 3e-5, and so do the weights of keys and all made from them.
      const double tolerance =
          dtype == DType::kF64 ? 1e-11 : std::max(1e-3, Tolerance(name, dtype));
      SCOPED_TRACE(Str(name, " ", ToString(dtype)));
      const AttentionRun run = RunAttention(ctx, c, in, name);
      EXPECT_LT(RelMax(run.o, out.o), tolerance);
      EXPECT_LT(RelMax(run.lse, out.lse), dtype == DType::kF64 ? 1e-14 : 1e-6);
      EXPECT_LT(RelMax(run.dq, grads.dq), tolerance);
      EXPECT_LT(RelMax(run.dk, grads.dk), tolerance);
      EXPECT_LT(RelMax(run.dv, grads.dv), tolerance);
    }
  }
}

TEST(AttentionTest, ReferenceGradientsMatchFiniteDifferences) {
  if (OnCuda()) return;  // f64 is for CPUs
  Context ctx = OneThread();
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::FromEnds(11, {{4, 11}}));
  const auto all = ops::BlockList::All(*documents);
  AttentionCase c{.mask_case = {.pattern = {"window", ops::AttentionPattern::Window(3, 1)},
                                .documents = {"two", documents},
                                .shard = {"whole", all, all},
                                .kv_heads = 2},
                  .dtype = DType::kF64,
                  .group = 2,
                  .dim = 5};
  AttentionInputs in = MakeInputs(c);
  const AttentionRun run = RunAttention(ctx, c, in, "reference");
  const auto loss = [&] {
    const AttentionRun r = RunAttention(ctx, c, in, "reference");
    return Dot(in.d_out, r.o) + Dot(in.dlse, r.lse);
  };
  EXPECT_LT(RelMax(run.dq, NumericGradient(in.q, loss)), 1e-8);
  EXPECT_LT(RelMax(run.dk, NumericGradient(in.k, loss)), 1e-8);
  EXPECT_LT(RelMax(run.dv, NumericGradient(in.v, loss)), 1e-8);
}

std::vector<std::pair<DType, ops::Normalization>> DtypesAndNormalizations() {
  std::vector<std::pair<DType, ops::Normalization>> all;
  for (const DType dtype : FloatDtypes()) {
    for (const ops::Normalization n : kNormalizations) all.emplace_back(dtype, n);
  }
  return all;
}

// Queries that see no key: exact zeros, and their gradients leave the buffers as they were.
TEST(AttentionTest, EmptyRowsGiveZeroAndNoGradient) {
  Context ctx = OneThread();
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(200, {{70, 200}}));
  // Keys 0..127 only: queries 128..199 see 70..127; keys 64..127 against queries 0..63: nothing.
  for (const std::vector<int32_t>& key_ids : {std::vector<int32_t>{1}, std::vector<int32_t>{}}) {
    const auto queries = ops::BlockList::All(*documents);
    const auto keys = ops::BlockList::FromIds(*documents, key_ids);
    for (const auto& [dtype, normalization] : DtypesAndNormalizations()) {
      AttentionCase c{.mask_case = {.pattern = {"window", ops::AttentionPattern::Window(20)},
                                    .documents = {"two", documents},
                                    .shard = {"part", queries, keys},
                                    .kv_heads = 1},
                      .dtype = dtype,
                      .dim = 16,
                      .normalization = normalization};
      const AttentionInputs in = MakeInputs(c);
      for (const std::string& name : ImplementationsFor(ctx, c)) {
        const AttentionRun run = RunAttention(ctx, c, in, name);
        for (size_t i = 0; i < 200; ++i) {
          const bool sees = !key_ids.empty() && i >= 64 && i < 128 + 19;
          double o = 0, dq = 0;
          for (size_t d = 0; d < 16; ++d) {
            o += std::abs(run.o[i * 16 + d]);
            dq += std::abs(run.dq[i * 16 + d]);
          }
          if (!c.sigmoid()) {
            EXPECT_EQ(std::isinf(run.lse[i]), !sees) << name << " row " << i;
            EXPECT_EQ(run.lse[i] < -1e300, !sees) << name << " row " << i;
          }
          if (!sees) {
            EXPECT_EQ(o, 0) << name << " row " << i;
            EXPECT_EQ(dq, 0) << name << " row " << i;
          } else {
            EXPECT_GT(o, 0) << name << " row " << i;
          }
        }
      }
    }
  }
}

// Longer than what the naive matrices allow: many entries a row, as in training.
TEST(AttentionTest, ImplementationsAgreeOnLongRows) {
  Context ctx = OneThread();
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(800, {{100, 800}}));
  const auto all = ops::BlockList::All(*documents);
  const NamedPattern patterns[] = {
      {"causal", ops::AttentionPattern::Causal()},
      {"s2", ops::AttentionPattern::S2({.local_blocks = 2, .stride_blocks = 2})}};
  for (const NamedPattern& pattern : patterns) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const AttentionCase c{.mask_case = {.pattern = pattern,
                                          .documents = {"two", documents},
                                          .shard = {"whole", all, all},
                                          .kv_heads = 2},
                            .dtype = dtype,
                            .group = 2,
                            .dim = 32};
      const AttentionInputs in = MakeInputs(c);
      const std::vector<std::string> names = ImplementationsFor(ctx, c);
      const AttentionRun want = RunAttention(ctx, c, in, names.back());
      for (const std::string& name : names) {
        SCOPED_TRACE(Str(name, " ", c.Name()));
        const AttentionRun run = RunAttention(ctx, c, in, name);
        const double tolerance = Tolerance(name, dtype);
        EXPECT_LT(RelMax(run.o, want.o), tolerance);
        EXPECT_LT(RelMax(run.lse, want.lse), tolerance);
        EXPECT_LT(RelMax(run.dq, want.dq), tolerance);
        EXPECT_LT(RelMax(run.dk, want.dk), tolerance);
        EXPECT_LT(RelMax(run.dv, want.dv), tolerance);
      }
    }
  }
}

// One key with a large weight and very many with small ones, which a running sum in f32 would lose
// one by one: the error of the sums must not grow with the number of keys.
TEST(AttentionTest, SmallProbabilitiesOfLongRowsCount) {
  Context ctx = OneThread();
  const int64_t tokens = OnCuda() ? 1 << 13 : 1 << 18, queries = 64, dim = 8;
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, tokens));
  const auto last =
      ops::BlockList::FromIds(*documents, {static_cast<int32_t>(tokens / ops::kMaskBlock - 1)});
  const auto all = ops::BlockList::All(*documents);
  const auto mask = ops::BlockMask::Build(ops::AttentionPattern::Causal(), 1, documents, last, all);
  const double sink = 5, sink_value = -2, value = 1.5;
  Vec q(static_cast<size_t>(queries * dim)), k(static_cast<size_t>(tokens * dim)),
      v(k.size(), value);
  for (size_t i = 0; i < q.size(); i += static_cast<size_t>(dim)) q[i] = 1;
  k[0] = sink;
  for (size_t d = 0; d < static_cast<size_t>(dim); ++d) v[d] = sink_value;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Tensor tq = FromVec(ctx, {queries, 1, dim}, dtype, q);
    const auto kv = ops::MakeKvView(FromVec(ctx, {tokens, 1, dim}, dtype, k),
                                    FromVec(ctx, {tokens, 1, dim}, dtype, v), all);
    for (const std::string& name :
         ImplementationsFor(ctx, {.dtype = dtype, .heads = 1, .kv_heads = 1, .head_dim = dim})) {
      const auto run =
          ops::AttentionForward(ctx, tq, kv, *mask, {.scale = 1, .implementation = name});
      const Vec o = ToVec(run.o), lse = ToVec(run.lse);
      // All small probabilities round to bf16 alike; the others divide by the sum of rounded ones.
      const double o_error = name == "mma_bf16" ? 4e-3 : 2e-4;
      for (int64_t i = 0; i < queries; ++i) {
        const double others = static_cast<double>(tokens - queries + i);
        const double sum = others + std::exp(sink);
        const double want = (others * value + std::exp(sink) * sink_value) / sum;
        EXPECT_NEAR(lse[static_cast<size_t>(i)], std::log(sum), 1e-4) << name << " row " << i;
        EXPECT_NEAR(o[static_cast<size_t>(i * dim)], want, o_error) << name << " row " << i;
      }
    }
  }
}

TEST(AttentionTest, RoundOutputRoundsOnce) {
  Context ctx = OneThread();
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, 100));
  const auto all = ops::BlockList::All(*documents);
  const auto mask = ops::BlockMask::Build(ops::AttentionPattern::Causal(), 1, documents, all, all);
  const Shape shape{100, 1, 16};
  const Tensor q = FromVec(ctx, shape, DType::kBF16, Normal(1600, 1, DType::kBF16));
  const auto kv = ops::MakeKvView(q, q, all);
  for (const ops::Normalization normalization : kNormalizations) {
    for (const std::string& name : ImplementationsFor(
             ctx, {.dtype = DType::kBF16, .heads = 1, .kv_heads = 1, .head_dim = 16})) {
      ops::AttentionOptions options{.implementation = name, .normalization = normalization};
      const auto wide = ops::AttentionForward(ctx, q, kv, *mask, options);
      options.round_output = true;
      const auto narrow = ops::AttentionForward(ctx, q, kv, *mask, options);
      ASSERT_EQ(wide.o.dtype(), DType::kF32);
      ASSERT_EQ(narrow.o.dtype(), DType::kBF16);
      EXPECT_EQ(ToVec(narrow.o), RoundedTo(DType::kBF16, ToVec(wide.o))) << name;
    }
  }
}

}  // namespace
}  // namespace longspan::test
