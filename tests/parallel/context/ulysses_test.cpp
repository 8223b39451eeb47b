// Exchanging heads for tokens: whatever the numbers of heads and ranks, the result is that of one
// rank, and the bytes are those of the plan.
#include "parallel/context/ulysses.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "ops/core/rng.h"
#include "parallel/comm/local.h"
#include "parallel/comm/simulated.h"
#include "parallel/context/choose.h"
#include "parallel/context/predict.h"
#include "parallel/context/strategy.h"
#include "tests/parallel/context/strategy_cases.h"

namespace longspan::test {
namespace {

using namespace parallel;

// Patterns of heads that are alike, that differ in work, and that differ each from each.
std::vector<ops::AttentionPattern> HeadPatterns(int64_t kv_heads) {
  ops::S2Options dense_tail{.block_size = 64, .local_blocks = 1, .stride_blocks = 3};
  dense_tail.dense_heads = kv_heads > 1 ? 1 : 0;
  dense_tail.allow_incomplete_coverage = true;
  std::vector<ops::HeadSpan> spans;
  for (int64_t h = 0; h < kv_heads; ++h) spans.push_back({h == 0 ? 0 : 40 * h, h == 0 ? 0 : h});
  return {ops::AttentionPattern::Causal(), ops::AttentionPattern::S2(dense_tail),
          ops::AttentionPattern::Spans(spans),
          ops::AttentionPattern::RandomBlocks({.density = 0.3, .seed = 5, .per_head = true})};
}

struct HeadCounts {
  int64_t heads, kv_heads;
};
constexpr HeadCounts kHeadCounts[] = {{4, 2}, {3, 3}, {8, 2}, {1, 1}, {6, 1}, {5, 5}, {12, 3}};

struct Split {
  StrategyOptions options;
  int ranks;
};
std::vector<Split> Splits() {
  std::vector<Split> splits;
  for (const int ranks : {1, 2, 3, 4, 8}) {
    for (const int64_t groups : {0, 1, 3}) {
      splits.push_back({{.kind = StrategyKind::kUlysses, .head_groups = groups}, ranks});
    }
  }
  for (const StrategyKind outer : {StrategyKind::kRing, StrategyKind::kExchange}) {
    for (const auto& [ranks, inner, node] :
         {std::tuple{4, 2, 0}, {4, 0, 2}, {6, 2, 0}, {6, 3, 3}, {8, 4, 4}, {8, 2, 4}, {3, 1, 0}}) {
      for (const int64_t groups : {0, 1, 2}) {
        splits.push_back({{.kind = StrategyKind::kHybrid,
                           .ranks_per_node = node,
                           .head_groups = groups,
                           .ulysses_ranks = inner,
                           .outer = outer},
                          ranks});
      }
    }
  }
  return splits;
}

// The product of splits, head counts, patterns, placements and rows; one case in `sample`.
void RunProduct(uint64_t sample, const ops::AttentionOptions& options = {}) {
  const Philox rng(11, StreamOf("exchanges of heads"));
  // Whole blocks for 8 ranks; a short last block and fewer blocks than ranks.
  const std::vector<std::pair<int64_t, std::vector<std::vector<int64_t>>>> rows = {
      {512, {{10, 70, 71, 300, 512}}}, {200, {{200}, {64, 130, 200}}}, {100, {{100}}}};
  uint64_t index = 0;
  int ran = 0;
  for (const HeadCounts& counts : kHeadCounts) {
    for (const auto& pattern : HeadPatterns(counts.kv_heads)) {
      for (const auto& [length, ends] : rows) {
        StrategyCase c{pattern.ToString(), pattern, ends, length};
        c.heads = counts.heads, c.kv_heads = counts.kv_heads, c.options = options;
        const Tensors in = Inputs(c, DType::kF64);
        std::unique_ptr<Outcome> expected;
        for (const PlacementKind kind : {PlacementKind::kContiguous, PlacementKind::kZigzag,
                                         PlacementKind::kStriped, PlacementKind::kBalanced}) {
          for (const Split& split : Splits()) {
            if (rng.Below(index++, sample) != 0) continue;
            if (expected == nullptr) expected = std::make_unique<Outcome>(RunCase(c, in));
            StrategyCase parts = c;
            parts.placement = kind, parts.strategy = split.options, parts.ranks = split.ranks;
            SCOPED_TRACE(Str(parts.Describe(), " ulysses_ranks ", split.options.ulysses_ranks,
                             " head_groups ", split.options.head_groups));
            const Outcome got = RunCase(parts, in);
            for (const auto& [output, vec] : kOutputs) {
              EXPECT_LT(RelMax(got.*vec, (*expected).*vec), 1e-12) << output;
            }
            ++ran;
          }
        }
      }
    }
  }
  ::testing::Test::RecordProperty("cases", ran);
  std::printf("%d cases\n", ran);
  EXPECT_GT(ran, 0);
}

TEST(UlyssesTest, SampleEqualsOneRank) { RunProduct(130); }
TEST(UlyssesTest, SampleWithSigmoidEqualsOneRank) {
  RunProduct(500, [] {
    ops::AttentionOptions options;
    options.normalization = ops::Normalization::kSigmoid;
    return options;
  }());
}
TEST(UlyssesExhaustiveTest, EveryCombinationEqualsOneRank) { RunProduct(1); }

// ---- bytes, counted by hand -------------------------------------------------------------------

TEST(UlyssesTest, EvenHeadsSendWhatTheFormulaSays) {
  // N tokens, P ranks: (P - 1) / P^2 N D e (2 Hq + 2 Hkv') and the row statistics.
  const int64_t n = 1024, dim = 16, e = 2;
  for (const auto& [heads, kv_heads, ranks] :
       {std::tuple{8, 8, 4}, {8, 4, 4}, {8, 2, 8}, {16, 8, 2}}) {
    StrategyCase c{"causal", ops::AttentionPattern::Causal(), {{n}}, n};
    c.heads = heads, c.kv_heads = kv_heads, c.ranks = ranks;
    const auto plan = MakePlan(c.pattern, kv_heads, DocumentsOf(c), PlacementOf(c),
                               {.kind = StrategyKind::kUlysses, .heads = heads}, 1);
    const ContextTraffic traffic = PlannedTraffic(*plan, heads, kv_heads, dim, DType::kBF16);
    const int64_t kv_sent = std::max(kv_heads, ranks), t = n / ranks;
    const int64_t others = (ranks - 1) * t;  // tokens to, and from, other ranks
    EXPECT_EQ(traffic.forward_bytes,
              others * (2 * heads + 2 * kv_sent) / ranks * dim * e + others * heads / ranks * 4);
    // A shared kv head's gradients travel in f32.
    const int64_t grad_bytes = kv_heads < ranks ? 4 : e;
    EXPECT_EQ(traffic.backward_bytes, others * 2 * heads / ranks * dim * e +
                                          others * 2 * kv_sent / ranks * dim * grad_bytes +
                                          others * heads / ranks * 4);
    const ContextTraffic sigmoid =
        PlannedTraffic(*plan, heads, kv_heads, dim, DType::kBF16, ops::Normalization::kSigmoid);
    EXPECT_EQ(traffic.forward_bytes - sigmoid.forward_bytes, others * heads / ranks * 4);
    EXPECT_EQ(traffic.backward_bytes - sigmoid.backward_bytes, others * heads / ranks * 4);
    EXPECT_EQ(plan->figures.forward_sent_rows, others * kv_sent / ranks);
    EXPECT_EQ(plan->figures.grad_sent_rows, others * kv_sent / ranks);
    EXPECT_EQ(plan->figures.backward_sent_rows, 0);
  }
}

// ---- time -------------------------------------------------------------------------------------

// What a plan predicts is what the chain does: both follow the same order of operations.
TEST(UlyssesTest, TimelinesAreThoseOfTheRun) {
  const int ranks = 6;
  NetworkOptions network{.intra = {1e-6, 1e9}, .inter = {5e-6, 2e8}, .ranks_per_node = 3};
  StrategyCase c{"s2", HeadPatterns(3)[1], {{130, 384}}, 384, PlacementKind::kZigzag};
  c.heads = 12, c.kv_heads = 3, c.ranks = ranks;
  const PlanSizes sizes{.heads = 12, .head_dim = 8, .dtype = DType::kF64};
  for (StrategyOptions options :
       {StrategyOptions{.kind = StrategyKind::kUlysses},
        StrategyOptions{.kind = StrategyKind::kUlysses, .head_groups = 1},
        StrategyOptions{.kind = StrategyKind::kHybrid, .ulysses_ranks = 3},
        StrategyOptions{.kind = StrategyKind::kHybrid,
        .head_groups = 3,
        .ulysses_ranks = 2,
        .outer = StrategyKind::kExchange}}) {
    options.heads = c.heads;
    const PlanMaker maker(DemandOf(c), options);
    // Transfers that hide behind the computation, and transfers that do not.
    for (const double flops_per_s : {1e9, 3e11}) {
      network.flops_per_s = flops_per_s;
      std::vector<Timeline> forward, backward;
      for (int r = 0; r < ranks; ++r) {
        PlanTimelines timelines = MakeTimelines(*maker.Build(r, /*with_masks=*/false), sizes);
        forward.push_back(std::move(timelines.forward));
        backward.push_back(std::move(timelines.backward));
      }
      const Prediction there = Predict(network, forward), back = Predict(network, backward);
      SimulatedNetwork simulated(ranks, network);
      RunLocal(ranks, [&](Communicator& world) {
        SimulatedCommunicator comm(world, simulated);
        Context ctx(ContextOptions{.threads = 1});
        const auto rank = static_cast<size_t>(comm.rank());
        const auto plan = maker.Build(comm.rank());
        const auto zeros = [&](int64_t heads) {
          return ctx.Zeros({plan->local_tokens, heads, sizes.head_dim}, sizes.dtype);
        };
        const Tensor q = zeros(c.heads), k = zeros(c.kv_heads);
        comm.ResetClocks();
        const auto saved = ContextAttentionForward(ctx, comm, *plan, q, k, k);
        EXPECT_NEAR(comm.now_s(), there.ranks[rank].finish_s, 1e-9 * there.largest.finish_s);
        comm.ResetClocks();
        ContextAttentionBackward(ctx, comm, *plan, q, q, k, k, saved);
        EXPECT_NEAR(comm.now_s(), back.ranks[rank].finish_s, 1e-9 * back.largest.finish_s);
      });
      EXPECT_GT(there.largest.compute_s, 0);
      EXPECT_GT(there.largest.exposed_s, 0);
    }
  }
}

// ---- errors -----------------------------------------------------------------------------------

TEST(UlyssesTest, OtherNumbersOfHeadsAreRefused) {
  StrategyCase c{"causal", ops::AttentionPattern::Causal(), {{128}}, 128};
  c.ranks = 2;
  RunLocal(2, [&](Communicator& comm) {
    Context ctx(ContextOptions{.threads = 1});
    const auto plan = MakePlan(c.pattern, 2, DocumentsOf(c), PlacementOf(c),
                               {.kind = StrategyKind::kUlysses, .heads = 2}, comm.rank());
    const Tensor q = ctx.Zeros({64, 4, 8}, DType::kF64), k = ctx.Zeros({64, 2, 8}, DType::kF64);
    try {
      ContextAttentionForward(ctx, comm, *plan, q, k, k);
      ADD_FAILURE() << "4 heads ran with a plan for 2";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find("set StrategyOptions::heads to 4"), std::string::npos)
          << e.what();
    }
  });
}

}  // namespace
}  // namespace longspan::test
