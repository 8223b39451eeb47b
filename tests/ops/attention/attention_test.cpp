// Every implementation against naive f64 attention, over patterns x documents x shards.
#include "ops/attention/attention.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/ops/attention/attention_fixture.h"

namespace longspan::test {
namespace {

constexpr int64_t kDims[] = {8, 40, 64, 80, 128, 256};
constexpr int64_t kGroups[] = {1, 2, 4};

// One thread: these tests are many tiny calls. attention_threads_test varies the number.
ContextOptions Poisoned() {
  ContextOptions options;
  options.threads = 1;
  options.poison_buffers = true;
  return options;
}

bool Runs(const std::string& implementation, DType dtype, int64_t dim) {
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    if (entry.name == implementation) {
      return entry.rejects({.dtype = dtype, .heads = 4, .kv_heads = 4, .head_dim = dim}).empty();
    }
  }
  ADD_FAILURE() << implementation << " is not in the table";
  return false;
}

std::vector<std::string> ImplementationsFor(const AttentionCase& c) {
  std::vector<std::string> names;
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    if (Runs(entry.name, c.dtype, c.dim)) names.push_back(entry.name);
  }
  return names;
}

// lse with its infinities compared exactly and taken out.
Vec FiniteLse(const Vec& lse, const Vec& want) {
  Vec finite(lse.size());
  for (size_t i = 0; i < lse.size(); ++i) {
    EXPECT_EQ(std::isinf(lse[i]), std::isinf(want[i])) << "row " << i;
    finite[i] = std::isinf(want[i]) ? 0 : lse[i];
  }
  return finite;
}

// Largest error over all results, each relative to its tensor.
double WorstError(const AttentionRun& run, const NaiveOutput& out, const NaiveGradients& grads) {
  double worst = RelMax(run.o, out.o);
  worst = std::max(worst, RelMax(FiniteLse(run.lse, out.lse), FiniteLse(out.lse, out.lse)));
  worst = std::max(worst, RelMax(run.dq, grads.dq));
  worst = std::max(worst, RelMax(run.dk, grads.dk));
  return std::max(worst, RelMax(run.dv, grads.dv));
}

// Runs all implementations that accept the case. bf16 operands are exact in f32, so an
// implementation may differ from the naive bf16-in f32 one only by its own f32 rounding.
void Check(Context& ctx, const AttentionCase& c) {
  SCOPED_TRACE(c.Name());
  const AttentionInputs in = MakeInputs(c);
  const NaiveOutput out = NaiveForward(in.problem, in.q, in.k, in.v);
  const NaiveGradients grads = NaiveBackward(in.problem, in.q, in.k, in.v, in.d_out, in.dlse);
  const double naive =
      c.dtype == DType::kBF16 ? WorstError(RunAttention(ctx, c, in, "reference"), out, grads) : 0;
  const double tolerance = c.dtype == DType::kF64   ? 1e-12
                           : c.dtype == DType::kF32 ? 1e-5
                                                    : 2 * naive + 2e-6;
  for (const std::string& name : ImplementationsFor(c)) {
    const AttentionRun run = RunAttention(ctx, c, in, name);
    EXPECT_EQ(run.implementation, name);
    EXPECT_LT(WorstError(run, out, grads), tolerance) << name;
  }
}

TEST(AttentionTest, AllImplementationsMatchNaiveOnSampledMasks) {
  Context ctx(Poisoned());
  std::vector<MaskCase> cases = SampleMaskCases(400, 5);
  std::erase_if(cases, [](const MaskCase& c) {  // the naive matrices are quadratic
    return c.documents.documents->tokens() > 800 || c.shard.keys.size() == 0;
  });
  ASSERT_GT(cases.size(), 100u);
  cases.resize(100);
  for (size_t i = 0; i < cases.size(); ++i) {
    const bool large = cases[i].documents.documents->tokens() > 300;
    AttentionCase c{.mask_case = cases[i]};
    c.dtype = i % 3 == 0 ? DType::kF64 : i % 3 == 1 ? DType::kF32 : DType::kBF16;
    c.dim = kDims[i % (large ? 2 : 6)];
    c.group = kGroups[i % (large ? 1 : 3)];
    c.with_dlse = i % 2 == 0;
    c.scale = i % 5 == 0 ? 0.3 : 0;
    c.seed = 100 + i;
    Check(ctx, c);
    if (testing::Test::HasFailure()) return;
  }
}

// Every head size, group and dtype at lengths that divide nothing.
TEST(AttentionTest, OddLengthsAndHeadSizes) {
  Context ctx(Poisoned());
  uint64_t seed = 1;
  for (const int64_t tokens : {1, 63, 65, 150}) {
    const auto documents = std::make_shared<ops::Documents>(ops::Documents::FromEnds(
        tokens, {tokens > 70 ? std::vector<int64_t>{70, tokens} : std::vector<int64_t>{tokens}}));
    const auto all = ops::BlockList::All(*documents);
    for (const int64_t dim : kDims) {
      for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
        AttentionCase c{.mask_case = {.pattern = {"causal", ops::AttentionPattern::Causal()},
                                      .documents = {"documents", documents},
                                      .shard = {"whole", all, all},
                                      .kv_heads = 2},
                        .dtype = dtype,
                        .group = kGroups[seed % 3],
                        .dim = dim,
                        .seed = seed};
        ++seed;
        Check(ctx, c);
      }
    }
  }
}

// Scores far apart: the running maximum must be followed, and exp must not overflow or turn into
// NaN where a row's first blocks weigh nothing.
TEST(AttentionTest, LargeScoresStayExact) {
  Context ctx(Poisoned());
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, 200));
  const auto all = ops::BlockList::All(*documents);
  AttentionCase c{.mask_case = {.pattern = {"window", ops::AttentionPattern::Window(100, 3)},
                                .documents = {"one", documents},
                                .shard = {"whole", all, all},
                                .kv_heads = 1},
                  .dim = 8,
                  .scale = 40};
  const AttentionInputs in = MakeInputs(c);
  const NaiveOutput out = NaiveForward(in.problem, in.q, in.k, in.v);
  for (const std::string& name : ImplementationsFor(c)) {
    const AttentionRun run = RunAttention(ctx, c, in, name);
    EXPECT_LT(RelMax(run.o, out.o), 1e-3) << name;  // scores near 500 carry 3e-5
    EXPECT_LT(RelMax(run.lse, out.lse), 1e-6) << name;
  }
}

TEST(AttentionTest, ReferenceGradientsMatchFiniteDifferences) {
  Context ctx(Poisoned());
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

// Queries that see no key: exact zeros, and their gradients leave the buffers as they were.
TEST(AttentionTest, EmptyRowsGiveZeroAndNoGradient) {
  Context ctx(Poisoned());
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(200, {{70, 200}}));
  // Keys 0..127 only: queries 128..199 see 70..127; keys 64..127 against queries 0..63: nothing.
  for (const std::vector<int32_t>& key_ids : {std::vector<int32_t>{1}, std::vector<int32_t>{}}) {
    const auto queries = ops::BlockList::All(*documents);
    const auto keys = ops::BlockList::FromIds(*documents, key_ids);
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
      AttentionCase c{.mask_case = {.pattern = {"window", ops::AttentionPattern::Window(20)},
                                    .documents = {"two", documents},
                                    .shard = {"part", queries, keys},
                                    .kv_heads = 1},
                      .dtype = dtype,
                      .dim = 16};
      const AttentionInputs in = MakeInputs(c);
      for (const std::string& name : ImplementationsFor(c)) {
        const AttentionRun run = RunAttention(ctx, c, in, name);
        for (size_t i = 0; i < 200; ++i) {
          const bool sees = !key_ids.empty() && i >= 64 && i < 128 + 19;
          EXPECT_EQ(std::isinf(run.lse[i]), !sees) << name << " row " << i;
          double o = 0, dq = 0;
          for (size_t d = 0; d < 16; ++d) {
            o += std::abs(run.o[i * 16 + d]);
            dq += std::abs(run.dq[i * 16 + d]);
          }
          if (!sees) {
            EXPECT_EQ(run.lse[i], -std::numeric_limits<double>::infinity());
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

TEST(AttentionTest, RoundOutputRoundsOnce) {
  Context ctx(Poisoned());
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, 100));
  const auto all = ops::BlockList::All(*documents);
  const auto mask = ops::BlockMask::Build(ops::AttentionPattern::Causal(), 1, documents, all, all);
  const Shape shape{100, 1, 16};
  const Tensor q = FromVec(ctx, shape, DType::kBF16, Normal(1600, 1, DType::kBF16));
  const auto kv = ops::MakeKvView(q, q, all);
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    if (!Runs(entry.name, DType::kBF16, 16)) continue;
    const auto wide = ops::AttentionForward(ctx, q, kv, *mask, {.implementation = entry.name});
    const auto narrow = ops::AttentionForward(ctx, q, kv, *mask,
                                              {.implementation = entry.name, .round_output = true});
    ASSERT_EQ(wide.o.dtype(), DType::kF32);
    ASSERT_EQ(narrow.o.dtype(), DType::kBF16);
    for (int64_t i = 0; i < wide.o.numel(); ++i) {
      ASSERT_EQ(narrow.o.data<BF16>()[i].bits, BF16(wide.o.data<float>()[i]).bits) << entry.name;
    }
  }
}

}  // namespace
}  // namespace longspan::test
