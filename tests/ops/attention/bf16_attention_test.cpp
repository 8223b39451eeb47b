// The entries that multiply in bf16: their error against that of a naive computation which rounds
// the same things, and what is particular to them.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "ops/core/rng.h"
#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

double Rounded(double value) { return RoundedTo(DType::kBF16, {value})[0]; }

// Whether two bf16 entries exist depends on the processor; there is at least one wherever this test
// is registered.
std::vector<std::string> Bf16Implementations(const Context& ctx, const AttentionCase& c) {
  std::vector<std::string> names = ImplementationsFor(ctx, c);
  std::erase_if(names, [](const std::string& name) { return !name.ends_with("_bf16"); });
  return names;
}

struct NaiveRun {
  Vec o, lse, dq, dk, dv;
};

// Of the scores of one row: the weights, the same as the product of the forward pass has them, and
// (softmax) lse.
struct RowWeights {
  Vec p, rounded;
  double lse = 0;
};
RowWeights WeightsOf(const AttentionCase& c, const Vec& scores) {
  RowWeights out;
  if (c.sigmoid()) {
    for (const double s : scores) {
      out.p.push_back(1 / (1 + std::exp(-s - c.ResolvedBias())));
      out.rounded.push_back(Rounded(out.p.back()));
    }
    return out;
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const double s : scores) sum += std::exp(s - top);
  out.lse = top + std::log(sum);
  for (const double s : scores) {
    out.p.push_back(std::exp(s - out.lse));
    out.rounded.push_back(Rounded(std::exp(s - top)) / sum);
  }
  return out;
}

// Attention with one weight matrix a head, in f64 except that weights (softmax, forward: relative
// to the row's maximum) and score gradients are rounded to bf16, as operands of products are.
NaiveRun NaiveBf16(const AttentionCase& c, const AttentionInputs& in) {
  const NaiveProblem& a = in.problem;
  const auto rows = static_cast<size_t>(a.queries.tokens());
  const auto keys = static_cast<size_t>(a.keys.tokens());
  const auto heads = static_cast<size_t>(a.heads), kv_heads = static_cast<size_t>(a.kv_heads);
  const auto dim = static_cast<size_t>(a.dim);
  NaiveRun out{Vec(in.q.size()), Vec(rows * heads), Vec(in.q.size()), Vec(in.k.size()),
               Vec(in.v.size())};
  const auto dot = [dim](const double* x, const double* y) {
    double sum = 0;
    for (size_t d = 0; d < dim; ++d) sum += x[d] * y[d];
    return sum;
  };
  const auto add = [dim](double weight, const double* x, double* to) {
    for (size_t d = 0; d < dim; ++d) to[d] += weight * x[d];
  };
  for (size_t h = 0; h < heads; ++h) {
    const size_t kv_head = h / (heads / kv_heads);
    for (size_t i = 0; i < rows; ++i) {
      const size_t at = (i * heads + h) * dim;
      std::vector<size_t> seen;
      Vec s;
      for (size_t j = 0; j < keys; ++j) {
        if (!Sees(a.pattern, a.kv_heads, *a.documents, static_cast<int64_t>(kv_head),
                  static_cast<int64_t>(i), static_cast<int64_t>(j))) {
          continue;
        }
        seen.push_back((j * kv_heads + kv_head) * dim);
        s.push_back(a.scale * dot(&in.q[at], &in.k[seen.back()]));
      }
      if (seen.empty()) {
        out.lse[i * heads + h] = -std::numeric_limits<double>::infinity();
        continue;
      }
      const RowWeights weights = WeightsOf(c, s);
      out.lse[i * heads + h] = weights.lse;
      for (size_t n = 0; n < s.size(); ++n) {
        add(weights.rounded[n], &in.v[seen[n]], &out.o[at]);
      }
      const double delta = dot(&in.d_out[at], &out.o[at]) - in.dlse[i * heads + h];
      for (size_t n = 0; n < s.size(); ++n) {
        const double p = weights.p[n], dp = dot(&in.d_out[at], &in.v[seen[n]]);
        const double ds = Rounded(c.sigmoid() ? p * (1 - p) * dp : p * (dp - delta)) * a.scale;
        add(Rounded(p), &in.d_out[at], &out.dv[seen[n]]);
        add(ds, &in.k[seen[n]], &out.dq[at]);
        add(ds, &in.q[at], &out.dk[seen[n]]);
      }
    }
  }
  return out;
}

void ExpectAtMostTwice(const char* what, const Vec& got, const Vec& naive, const Vec& exact) {
  EXPECT_LE(RelRms(got, exact), 2 * RelRms(naive, exact) + 1e-6) << what;
}

void Check(Context& ctx, const AttentionCase& c) {
  SCOPED_TRACE(c.Name());
  const AttentionInputs in = MakeInputs(c);
  const AttentionRun want = RunNaive(c, in);
  const NaiveRun naive = NaiveBf16(c, in);
  const std::vector<std::string> names = Bf16Implementations(ctx, c);
  ASSERT_FALSE(names.empty());
  for (const std::string& name : names) {
    SCOPED_TRACE(name);
    const AttentionRun run = RunAttention(ctx, c, in, name);
    ExpectAtMostTwice("o", run.o, naive.o, want.o);
    ExpectAtMostTwice("dq", run.dq, naive.dq, want.dq);
    ExpectAtMostTwice("dk", run.dk, naive.dk, want.dk);
    ExpectAtMostTwice("dv", run.dv, naive.dv, want.dv);
    // No rounded operand enters lse.
    for (size_t i = 0; i < want.lse.size(); ++i) {
      if (std::isinf(want.lse[i])) {
        EXPECT_EQ(run.lse[i], want.lse[i]);
      } else {
        EXPECT_NEAR(run.lse[i], want.lse[i], 2e-6 * std::max(1.0, std::abs(want.lse[i])));
      }
    }
  }
}

AttentionCase CaseOf(NamedPattern pattern, int64_t tokens, std::vector<int64_t> ends,
                     int64_t kv_heads) {
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(tokens, {std::move(ends)}));
  const auto all = ops::BlockList::All(*documents);
  return {.mask_case = {.pattern = std::move(pattern),
                        .documents = {Str(tokens, " tokens"), documents},
                        .shard = {"whole", all, all},
                        .kv_heads = kv_heads},
          .dtype = DType::kBF16};
}

std::vector<NamedPattern> SomePatterns() {
  return {{"causal", ops::AttentionPattern::Causal()},
          {"full", ops::AttentionPattern::Full()},
          {"window", ops::AttentionPattern::Window(90, 3)},
          {"s2", ops::AttentionPattern::S2(
                     {.local_blocks = 1, .stride_blocks = 2, .allow_incomplete_coverage = true})}};
}

TEST(Bf16AttentionTest, ErrorIsAtMostTwiceTheNaiveOne) {
  Context ctx = OpContext(1);
  const std::vector<NamedPattern> patterns = SomePatterns();
  uint64_t seed = 1;
  for (const int64_t dim : {8, 24, 64, 80, 96, 128, 192, 256}) {
    for (const int64_t group : {1, 4, 16}) {
      // 193: a last block of one token; 150: tails that are no multiple of 16 or 32.
      const int64_t tokens = seed % 2 == 0 ? 193 : 150;
      AttentionCase c =
          CaseOf(patterns[seed % patterns.size()], tokens, {70, tokens}, group == 16 ? 1 : 2);
      c.dim = dim;
      c.group = group;
      c.aligned = seed % 3 != 0;
      c.with_dlse = seed % 2 == 0;
      c.seed = ++seed;
      for (const ops::Normalization normalization : kNormalizations) {
        c.normalization = normalization;
        Check(ctx, c);
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

// The running maximum follows scores only when they exceed it by 2^8. Keys that grow from block to
// block, by less and by more than that, leave lanes at all distances from their true maximum.
TEST(Bf16AttentionTest, RisingScoresAreFollowed) {
  Context ctx = OpContext(1);
  for (const double growth : {0.4, 1.0, 3.0}) {
    AttentionCase c = CaseOf({"full", ops::AttentionPattern::Full()}, 400, {400}, 1);
    c.dim = 32;
    AttentionInputs in = MakeInputs(c);
    for (size_t i = 0; i < in.k.size(); ++i) {
      in.k[i] *= 1 + growth * static_cast<double>(i / (64 * 32));
    }
    in.k = RoundedTo(DType::kBF16, in.k);
    const NaiveOutput out = NaiveForward(in.problem, in.q, in.k, in.v);
    const NaiveRun naive = NaiveBf16(c, in);
    for (const std::string& name : Bf16Implementations(ctx, c)) {
      SCOPED_TRACE(Str(name, " growth ", growth));
      const AttentionRun run = RunAttention(ctx, c, in, name);
      ExpectAtMostTwice("o", run.o, naive.o, out.o);
      EXPECT_LT(RelMax(run.lse, out.lse), 1e-6);
    }
  }
}

// Scores that are all far below 0: nothing may underflow, and where a block has fewer than 64 keys,
// what stands in for the others (scores of 0) may not overflow.
TEST(Bf16AttentionTest, LowScoresDoNotVanish) {
  Context ctx = OpContext(1);
  for (const int64_t tokens : {128, 129, 170}) {
    AttentionCase c = CaseOf({"full", ops::AttentionPattern::Full()}, tokens, {tokens}, 1);
    c.dim = 16;
    c.scale = 1;
    AttentionInputs in = MakeInputs(c);
    for (double& k : in.k) k = Rounded(k - 20);
    for (double& q : in.q) q = Rounded(2 + q / 64);  // s near -640
    const NaiveOutput out = NaiveForward(in.problem, in.q, in.k, in.v);
    const NaiveGradients grads = NaiveBackward(in.problem, in.q, in.k, in.v, in.d_out, in.dlse);
    const NaiveRun naive = NaiveBf16(c, in);
    // Scores near 640 carry 6e-5 in f32.
    const auto expect = [](const char* what, const Vec& got, const Vec& rounded, const Vec& exact) {
      EXPECT_LT(RelRms(got, exact), 2 * RelRms(rounded, exact) + 1e-3) << what;
    };
    for (const std::string& name : Bf16Implementations(ctx, c)) {
      SCOPED_TRACE(Str(name, " ", tokens));
      const AttentionRun run = RunAttention(ctx, c, in, name);
      expect("o", run.o, naive.o, out.o);
      expect("dq", run.dq, naive.dq, grads.dq);
      expect("dk", run.dk, naive.dk, grads.dk);
      expect("dv", run.dv, naive.dv, grads.dv);
      EXPECT_LT(RelMax(run.lse, out.lse), 1e-6);
    }
  }
}

// NaN anywhere in what a query sees must reach its results.
TEST(Bf16AttentionTest, NanReachesTheResults) {
  Context ctx = OpContext(1);
  AttentionCase c = CaseOf({"causal", ops::AttentionPattern::Causal()}, 100, {100}, 1);
  c.dim = 24;
  AttentionInputs in = MakeInputs(c);
  in.q[50 * 24 + 3] = std::numeric_limits<double>::quiet_NaN();
  for (const ops::Normalization normalization : kNormalizations) {
    c.normalization = normalization;
    for (const std::string& name : Bf16Implementations(ctx, c)) {
      const AttentionRun run = RunAttention(ctx, c, in, name);
      for (size_t i = 0; i < 100; ++i) {
        if (!c.sigmoid()) {
          EXPECT_EQ(std::isnan(run.lse[i]), i == 50) << name << " row " << i;
        }
        EXPECT_EQ(std::isnan(run.o[i * 24]), i == 50) << name << " row " << i;
        EXPECT_EQ(std::isnan(run.dq[i * 24]), i == 50) << name << " row " << i;
        // Keys of the same block that the query does not see meet it with weight 0.
        EXPECT_TRUE(std::isnan(run.dk[i * 24]) || i > 50) << name << " key " << i;
      }
    }
  }
}

// Long enough that columns are cut into pieces and the mask into parts (bf16_pieces.h).
TEST(Bf16AttentionTest, LongRowsInSeveralParts) {
  Context ctx = OpContext(2);
  AttentionCase c = CaseOf({"causal", ops::AttentionPattern::Causal()}, 3000, {700, 3000}, 2);
  c.dim = 8;
  c.group = 16;
  const AttentionInputs in = MakeInputs(c);
  const AttentionRun want = RunAttention(ctx, c, in, "portable");
  for (const std::string& name : Bf16Implementations(ctx, c)) {
    SCOPED_TRACE(name);
    const AttentionRun run = RunAttention(ctx, c, in, name);
    EXPECT_LT(RelRms(run.o, want.o), 5e-3);
    EXPECT_LT(RelRms(run.dq, want.dq), 5e-3);
    EXPECT_LT(RelRms(run.dk, want.dk), 5e-3);
    EXPECT_LT(RelRms(run.dv, want.dv), 5e-3);
    // The same bits for other numbers of threads, also where several tasks share a column.
    for (const int threads : {1, 3}) {
      Context other = OpContext(threads);
      const AttentionRun again = RunAttention(other, c, in, name);
      EXPECT_EQ(again.dq, run.dq) << threads;
      EXPECT_EQ(again.dk, run.dk) << threads;
      EXPECT_EQ(again.dv, run.dv) << threads;
    }
  }
}

// An f32 gradient of the output is rounded once, to what the bf16 one would have been.
TEST(Bf16AttentionTest, WideOutputGradientsAreRounded) {
  Context ctx = OpContext(1);
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, 150));
  const auto all = ops::BlockList::All(*documents);
  const auto mask = ops::BlockMask::Build(ops::AttentionPattern::Causal(), 1, documents, all, all);
  for (const int64_t dim : {64, 40}) {
    const Shape shape{150, 2, dim}, kv_shape{150, 1, dim};
    const auto random = [&](const Shape& s, uint64_t seed) {
      return FromVec(ctx, s, DType::kBF16, Normal(s.numel(), seed, DType::kBF16));
    };
    const Tensor q = random(shape, 1);
    const auto kv = ops::MakeKvView(random(kv_shape, 2), random(kv_shape, 3), all);
    const Vec d_out = Normal(shape.numel(), 4);  // values of f32
    const Tensor wide = FromVec(ctx, shape, DType::kF32, d_out);
    const Tensor narrow = FromVec(ctx, shape, DType::kBF16, d_out);
    for (const std::string& name : ImplementationsFor(
             ctx, {.dtype = DType::kBF16, .heads = 2, .kv_heads = 1, .head_dim = dim})) {
      if (!name.ends_with("_bf16")) continue;
      const auto forward = ops::AttentionForward(ctx, q, kv, *mask, {.implementation = name});
      const Tensor delta = ops::AttentionDelta(ctx, narrow, forward.o);
      std::vector<std::vector<Tensor>> results;
      for (const Tensor& gradient : {wide, narrow}) {
        Tensor dq = ctx.Zeros(shape, DType::kF32);
        const Tensor dk = ctx.Zeros(kv_shape, DType::kF32), dv = ctx.Zeros(kv_shape, DType::kF32);
        ops::AttentionBackward(ctx, gradient, q, kv, forward.lse, delta, *mask, dq,
                               ops::MakeKvGradView(dk, dv, all), {.implementation = name});
        results.push_back({dq, dk, dv});
      }
      for (size_t i = 0; i < 3; ++i) {
        EXPECT_TRUE(SameBits(results[0][i], results[1][i])) << name << " " << dim << " " << i;
      }
    }
  }
}

}  // namespace
}  // namespace longspan::test
