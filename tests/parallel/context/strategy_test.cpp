// Every strategy x placement x pattern x rank count equals attention on one rank, in f64, forward
// and backward, and sends exactly the bytes that the plan says.
#include "parallel/context/strategy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "ops/core/rng.h"
#include "parallel/comm/self.h"
#include "parallel/context/builder.h"
#include "parallel/context/executor.h"
#include "tests/parallel/context/mask_families.h"
#include "tests/parallel/context/pairwise.h"
#include "tests/parallel/context/strategy_cases.h"

namespace longspan::test {
namespace {

using namespace parallel;

constexpr PlacementKind kPlacements[] = {PlacementKind::kContiguous, PlacementKind::kZigzag,
                                         PlacementKind::kStriped, PlacementKind::kBalanced};
constexpr int64_t kAllRows = int64_t{1} << 40;

// Strategies with the options that lead to other programs; nodes are a dimension of their own.
const std::vector<StrategyOptions>& Strategies() {
  static const std::vector<StrategyOptions> strategies = {
      {.kind = StrategyKind::kRing},
      {.kind = StrategyKind::kDoubleRing},
      {.kind = StrategyKind::kAllGather},
      {.kind = StrategyKind::kAllGather, .head_groups = 1},
      {.kind = StrategyKind::kExchange},
      {.kind = StrategyKind::kExchange, .stages = 3, .keep_rows = kAllRows},
      {.kind = StrategyKind::kExchange, .stages = 1, .deduplicate = false},
      // Some ranks keep what they receive and others fetch it again.
      {.kind = StrategyKind::kExchange, .keep_rows = 500},
      {.kind = StrategyKind::kUlysses},
      {.kind = StrategyKind::kHybrid},
      {.kind = StrategyKind::kHybrid, .outer = StrategyKind::kExchange},
  };
  return strategies;
}

struct Layout {
  int64_t row_length;
  std::vector<std::vector<int64_t>> ends;
};
const std::vector<Layout>& Layouts() {
  static const std::vector<Layout> layouts = {
      {512, {{512}}},
      // The last block is short, and block counts are no multiple of any number of ranks here.
      {690, {{10, 70, 71, 348, 690}}},
      {330, {{10, 70, 71, 168, 330}, {110, 330}}},
      {130, {{130}}},  // three blocks: most ranks are empty
  };
  return layouts;
}

constexpr std::pair<int64_t, int64_t> kHeadCounts[] = {{4, 2}, {3, 3}, {6, 2}};

// Dimensions: pattern, placement, strategy, nodes, ranks, heads, layout, normalization.
constexpr int kNodes[] = {1, 2, 4};
StrategyCase CaseOf(const Choice& choice, const std::vector<int>& rank_counts) {
  const auto at = [&](size_t i) { return static_cast<size_t>(choice[i]); };
  const auto [heads, kv_heads] = kHeadCounts[at(5)];
  const auto [name, pattern] = Patterns(kv_heads)[at(0)];
  const Layout& layout = Layouts()[at(6)];
  StrategyCase c{name, pattern, layout.ends, layout.row_length};
  c.placement = kPlacements[at(1)];
  c.strategy = Strategies()[at(2)];
  c.ranks = rank_counts[at(4)];
  c.strategy.ranks_per_node = kNodes[at(3)];
  const bool whole_nodes = c.ranks % c.strategy.ranks_per_node == 0;
  if (c.strategy.kind == StrategyKind::kDoubleRing && !whole_nodes) c.strategy.ranks_per_node = 0;
  c.heads = heads, c.kv_heads = kv_heads;
  if (at(7) == 1) c.options = Sigmoid();
  return c;
}

// Runs cases against one rank, whose results are kept for cases that differ only in how they run.
class Comparison {
 public:
  void Run(const StrategyCase& c) {
    SCOPED_TRACE(c.Describe());
    const bool sigmoid = c.options.normalization == ops::Normalization::kSigmoid;
    const Key key{c.name, c.row_length, c.heads, c.kv_heads, sigmoid};
    Truth& truth = truths_[key];
    if (truth.outcome.o.empty()) {
      StrategyCase one = c;
      one.ranks = 1;
      one.placement = PlacementKind::kContiguous;
      one.strategy = StrategyOf(StrategyKind::kRing);
      truth.in = Inputs(c, DType::kF64);
      truth.outcome = RunCase(one, truth.in);
    }
    const Outcome got = RunCase(c, truth.in);
    for (const auto& [output, vec] : kOutputs) {
      EXPECT_LT(Difference(got.*vec, truth.outcome.*vec), 1e-12) << output;
    }
    ++ran_;
  }
  ~Comparison() {
    ::testing::Test::RecordProperty("cases", ran_);
    EXPECT_GT(ran_, 0);
    std::printf("%d cases\n", ran_);
  }

 private:
  using Key = std::tuple<std::string, int64_t, int64_t, int64_t, bool>;
  struct Truth {
    Tensors in;
    Outcome outcome;
  };
  std::map<Key, Truth> truths_;
  int ran_ = 0;
};

// Every two values of two dimensions meet in some case; one test runs every fourth of them.
void RunSample(size_t part) {
  const std::vector<int> ranks = {2, 3, 4, 8};
  const std::vector<Choice> cases =
      AllPairs({static_cast<int>(Patterns().size()), 4, static_cast<int>(Strategies().size()), 3,
                static_cast<int>(ranks.size()), 3, static_cast<int>(Layouts().size()), 2},
               /*seed=*/7);
  ASSERT_LE(cases.size(), 300u);
  Comparison comparison;
  for (size_t i = part; i < cases.size(); i += 4) comparison.Run(CaseOf(cases[i], ranks));
}
TEST(StrategyTest, SampleEqualsOneRankPart1) { RunSample(0); }
TEST(StrategyTest, SampleEqualsOneRankPart2) { RunSample(1); }
TEST(StrategyTest, SampleEqualsOneRankPart3) { RunSample(2); }
TEST(StrategyTest, SampleEqualsOneRankPart4) { RunSample(3); }

// All patterns x placements x strategies x nodes (where they matter) x heads (of sigmoid only the
// first ones); layouts in turn.
void RunEverything(int ranks, bool sigmoid) {
  Comparison comparison;
  Choice c(8);
  int turn = 0;
  for (c[0] = 0; c[0] < static_cast<int>(Patterns().size()); ++c[0]) {
    for (c[1] = 0; c[1] < 4; ++c[1]) {
      for (c[2] = 0; c[2] < static_cast<int>(Strategies().size()); ++c[2]) {
        const StrategyKind kind = Strategies()[static_cast<size_t>(c[2])].kind;
        const bool nodes = kind == StrategyKind::kDoubleRing || kind == StrategyKind::kExchange;
        for (c[3] = 0; c[3] < (nodes && ranks > 2 ? 3 : 1); ++c[3]) {
          for (c[5] = 0; c[5] < (sigmoid ? 1 : 3); ++c[5]) {
            c[6] = turn++ % static_cast<int>(Layouts().size());
            c[7] = sigmoid ? 1 : 0;
            comparison.Run(CaseOf(c, {ranks}));
          }
        }
      }
    }
  }
}
class StrategyExhaustiveTest : public ::testing::TestWithParam<int> {};
TEST_P(StrategyExhaustiveTest, EveryCombinationEqualsOneRank) { RunEverything(GetParam(), false); }
TEST_P(StrategyExhaustiveTest, EveryCombinationOfSigmoidEqualsOneRank) {
  RunEverything(GetParam(), true);
}
INSTANTIATE_TEST_SUITE_P(Ranks, StrategyExhaustiveTest, ::testing::Values(1, 2, 3, 4, 8),
                         ::testing::PrintToStringParamName());

// Random block masks with seeds of their own, on any number of ranks up to 8.
TEST(StrategyTest, RandomBlockMasksEqualOneRank) {
  const Philox rng(2024, StreamOf("random block masks"));
  uint64_t draw = 0;
  const auto below = [&](uint64_t n) { return static_cast<int>(rng.Below(draw++, n)); };
  for (int i = 0; i < 24; ++i) {
    ops::RandomBlocksOptions random{.block_size = 64};
    random.density = 0.05 + 0.1 * below(6);
    random.seed = below(1000000);
    random.per_head = below(2) == 1;
    random.own_block = below(2) == 1;
    random.bidirectional = below(2) == 1;
    const Layout& layout = Layouts()[static_cast<size_t>(below(3))];
    StrategyCase c{Str("random blocks, density ", random.density, ", seed ", random.seed),
                   ops::AttentionPattern::RandomBlocks(random), layout.ends, layout.row_length};
    c.placement = kPlacements[below(4)];
    c.strategy = Strategies()[static_cast<size_t>(below(Strategies().size()))];
    c.ranks = 2 + below(7);
    c.strategy.ranks_per_node = 1 + below(4);
    if (c.ranks % c.strategy.ranks_per_node != 0 && c.strategy.kind == StrategyKind::kDoubleRing) {
      c.strategy.ranks_per_node = 1;
    }
    Comparison().Run(c);
  }
}

// The 14 families of LongCA-bench on a row that no rank count divides, each in every strategy.
TEST(StrategyTest, MaskFamiliesEqualOneRank) {
  const int64_t tokens = 700;
  size_t turn = 0;
  for (const MaskFamily& family : MaskFamilies(tokens, /*seed=*/11)) {
    Comparison comparison;
    for (const StrategyOptions& strategy : Strategies()) {
      StrategyCase c{family.name, family.pattern, {family.ends}, tokens};
      c.strategy = strategy;
      c.placement = kPlacements[turn % 4];
      c.ranks = std::array{8, 4, 6}[turn % 3];
      c.strategy.ranks_per_node = turn % 2 == 0 ? 2 : 1;
      ++turn;
      comparison.Run(c);
    }
  }
}

// Sigmoid attention of causal documents pair by pair, all in f64.
constexpr int64_t kHeads = 4, kKvHeads = 2;  // of a case unless it says otherwise
Outcome PlainSigmoid(const Tensors& in, const std::vector<int64_t>& ends, double bias) {
  Outcome out;
  out.o.resize(in.q.size()), out.dq.resize(in.q.size());
  out.dk.resize(in.k.size()), out.dv.resize(in.k.size());
  const double scale = 1 / std::sqrt(static_cast<double>(kDim));
  int64_t begin = 0;
  for (const int64_t end : ends) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < kHeads; ++h) {
        const size_t q = static_cast<size_t>((i * kHeads + h) * kDim);
        for (int64_t j = begin; j <= i; ++j) {
          const size_t k = static_cast<size_t>((j * kKvHeads + h / (kHeads / kKvHeads)) * kDim);
          double score = bias, dp = 0;
          for (size_t d = 0; d < kDim; ++d) score += scale * in.q[q + d] * in.k[k + d];
          for (size_t d = 0; d < kDim; ++d) dp += in.d_out[q + d] * in.v[k + d];
          const double p = (1 + std::tanh(score / 2)) / 2, ds = scale * p * (1 - p) * dp;
          for (size_t d = 0; d < kDim; ++d) {
            out.o[q + d] += p * in.v[k + d];
            out.dq[q + d] += ds * in.k[k + d];
            out.dk[k + d] += ds * in.q[q + d];
            out.dv[k + d] += p * in.d_out[q + d];
          }
        }
      }
    }
    begin = end;
  }
  return out;
}

// The equality with one rank would not see options that get lost on the way, or a bias of each
// rank's own tokens.
TEST(StrategySigmoidTest, EqualsPlainArithmeticWithTheBiasOfTheRow) {
  const int64_t length = 512;
  const std::vector<int64_t> ends = {10, 70, 71, 300, length};
  StrategyCase c{"causal", ops::AttentionPattern::Causal(), {ends}, length, PlacementKind::kZigzag};
  const Tensors in = Inputs(c, DType::kF64);
  for (const std::optional<double> bias : {std::optional<double>(), std::optional<double>(1.5)}) {
    const Outcome expected =
        PlainSigmoid(in, ends, bias.value_or(-std::log(static_cast<double>(length))));
    for (const int ranks : {1, 2, 4}) {
      for (const StrategyOptions& strategy : Strategies()) {
        c.ranks = ranks, c.strategy = strategy;
        c.options = Sigmoid(bias);
        SCOPED_TRACE(Str(c.Describe(), ", bias ", bias.value_or(0)));
        const Outcome got = RunCase(c, in);
        for (const auto& [output, vec] : kOutputs) {
          EXPECT_LT(Difference(got.*vec, expected.*vec), 1e-12) << output;
        }
      }
    }
  }
}

// Tiles so rare that some ranks see nothing at all: their outputs and gradients are 0, and they
// still take part in every exchange.
TEST(StrategyTest, RanksThatSeeNothing) {
  const int ranks = 4;
  const int64_t length = 512;
  const auto rare = ops::AttentionPattern::RandomBlocks(
      {.density = 0.06, .seed = 3, .per_head = true, .own_block = false});
  StrategyCase c{"rare", rare, {{length}}, length};
  c.ranks = ranks;
  const auto demand = DemandOf(c);
  int64_t blind = 0, pairs = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    blind += demand->TotalPairs(rank) == 0;
    pairs += demand->TotalPairs(rank);
  }
  ASSERT_GT(blind, 0);
  ASSERT_GT(pairs, 0);
  for (const bool sigmoid : {false, true}) {
    if (sigmoid) c.options = Sigmoid();
    Comparison comparison;
    for (const StrategyOptions& strategy : Strategies()) {
      c.strategy = strategy;
      comparison.Run(c);
    }
  }
}

// RunCase compares what is sent with PlannedTraffic; here that is counted by hand.
TEST(StrategyTest, Bf16SendsKeysInTwoBytesAndTheirGradientsInFour) {
  const int64_t elements = 2 * (512 / 4) * kKvHeads * kDim;
  StrategyCase c{"causal", ops::AttentionPattern::Causal(), {{512}}, 512, PlacementKind::kZigzag};
  c.ranks = 4;
  for (const StrategyKind kind :
       {StrategyKind::kRing, StrategyKind::kDoubleRing, StrategyKind::kAllGather}) {
    c.strategy = {.kind = kind, .ranks_per_node = 2};
    const auto plan = PlanMaker(DemandOf(c), c.strategy).Build(/*rank=*/1);
    const auto traffic = PlannedTraffic(*plan, kHeads, kKvHeads, kDim, DType::kBF16);
    // The backward pass of a ring starts from the keys that the forward pass received last.
    const int64_t key_steps = kind == StrategyKind::kAllGather ? 3 : 2;
    EXPECT_EQ(traffic.forward_bytes, 3 * 2 * elements) << ToString(kind);
    EXPECT_EQ(traffic.backward_bytes, (key_steps * 2 + 3 * 4) * elements) << ToString(kind);
  }
}

TEST(StrategyTest, PlanOfAnotherRankIsRefused) {
  Context ctx(ContextOptions{.threads = 1});
  StrategyCase c{"causal", ops::AttentionPattern::Causal(), {{256}}, 256, PlacementKind::kZigzag};
  c.ranks = 2, c.kv_heads = 1;
  const auto plan = PlanMaker(DemandOf(c), c.strategy).Build(/*rank=*/1);
  SelfCommunicator self;
  const Tensor q = ctx.Zeros({128, 1, 8}, DType::kF64);
  EXPECT_THROW(ContextAttentionForward(ctx, self, *plan, q, q, q), InvalidArgument);
}

TEST(StrategyTest, DoubleRingNeedsWholeNodes) {
  StrategyCase c{"causal", ops::AttentionPattern::Causal(), {{512}}, 512};
  c.ranks = 4;
  const StrategyOptions options{.kind = StrategyKind::kDoubleRing, .ranks_per_node = 3};
  EXPECT_THROW(ProgramBuilder(*DemandOf(c), options), InvalidArgument);
}

TEST(StrategyTest, ProgramsForForecastsCannotRun) {
  StrategyCase c{"causal", ops::AttentionPattern::Causal(), {{256}}, 256};
  c.ranks = 2;
  const Programs programs =
      ProgramBuilder(*DemandOf(c), StrategyOf(StrategyKind::kExchange)).Build(0, false);
  Context ctx(ContextOptions{.threads = 1});
  SelfCommunicator self;
  const Tensor q = ctx.Zeros({128, 2, 8}, DType::kF64);
  EXPECT_THROW(RunForward(ctx, self, programs.forward, q, q, q, {}), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
