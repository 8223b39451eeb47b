// Every strategy x placement x pattern x rank count equals attention on one rank, in f64, forward
// and backward, and sends exactly the bytes that the plan says.
#include "parallel/context/strategy.h"

#include <gtest/gtest.h>

#include <cmath>

#include "ops/core/rng.h"
#include "parallel/comm/self.h"
#include "tests/parallel/context/strategy_cases.h"

namespace longspan::test {
namespace {

using namespace parallel;

// The full product for `ranks`; `sample` keeps one case in that many, chosen by a fixed seed.
void RunProduct(const std::vector<int>& rank_counts, uint64_t sample,
                const ops::AttentionOptions& options = {}) {
  int ran = 0;
  uint64_t index = 0;
  const Philox rng(7, StreamOf("strategy cases"));
  for (int ranks : rank_counts) {
    for (PlacementKind placement : {PlacementKind::kContiguous, PlacementKind::kZigzag}) {
      const int64_t granule =
          ranks == 1 ? 64 : 64 * ranks * (placement == PlacementKind::kZigzag ? 2 : 1);
      const int64_t length = granule * ((granule < 512) ? 512 / granule : 1);
      const std::vector<std::vector<std::vector<int64_t>>> layouts = {
          {{length}}, {{10, 70, 71, length / 2 + 3, length}, {length / 3, length}}};
      for (size_t layout = 0; layout < layouts.size(); ++layout) {
        for (const auto& [name, pattern] : Patterns()) {
          // One rank is the truth for both strategies.
          StrategyCase truth{name,
                             pattern,
                             layouts[layout],
                             length,
                             PlacementKind::kContiguous,
                             StrategyKind::kRing,
                             1};
          truth.options = options;
          const int64_t tokens = length * static_cast<int64_t>(layouts[layout].size());
          std::unique_ptr<Outcome> expected;
          Tensors in;
          for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
            if (rng.Below(index++, sample) != 0) continue;
            if (expected == nullptr) {
              in = Inputs(tokens, DType::kF64);
              expected = std::make_unique<Outcome>(RunCase(truth, in));
            }
            StrategyCase c = truth;
            c.placement = placement, c.strategy = strategy, c.ranks = ranks;
            SCOPED_TRACE(Str(name, " layout ", layout, " ", ToString(placement), " ",
                             ToString(strategy), " on ", ranks));
            const Outcome got = RunCase(c, in);
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
  EXPECT_GT(ran, 0);
}

TEST(StrategyTest, EveryCombinationOnTwoRanksEqualsOneRank) { RunProduct({2}, 1); }
TEST(StrategyTest, SampleUpToEightRanksEqualsOneRank) { RunProduct({1, 3, 4, 5, 8}, 4); }
TEST(StrategyExhaustiveTest, EveryCombinationUpToEightRanksEqualsOneRank) {
  RunProduct({1, 2, 3, 4, 5, 6, 7, 8}, 1);
}

TEST(StrategySigmoidTest, EveryCombinationOnTwoRanksEqualsOneRank) {
  RunProduct({2}, 1, Sigmoid());
}
TEST(StrategySigmoidTest, SampleUpToEightRanksEqualsOneRank) {
  RunProduct({1, 3, 4, 5, 6, 7, 8}, 6, Sigmoid(-2.5));
}
TEST(StrategySigmoidExhaustiveTest, EveryCombinationUpToEightRanksEqualsOneRank) {
  RunProduct({1, 2, 3, 4, 5, 6, 7, 8}, 1, Sigmoid());
}

// Sigmoid attention of causal documents pair by pair, all in f64.
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
  const Tensors in = Inputs(length, DType::kF64);
  for (const std::optional<double> bias : {std::optional<double>(), std::optional<double>(1.5)}) {
    const Outcome expected =
        PlainSigmoid(in, ends, bias.value_or(-std::log(static_cast<double>(length))));
    for (const int ranks : {1, 2, 4}) {
      for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
        StrategyCase c{"causal", ops::AttentionPattern::Causal(), {ends},
                       length,   PlacementKind::kZigzag,          strategy,
                       ranks};
        c.options = Sigmoid(bias);
        SCOPED_TRACE(Str(ToString(strategy), " on ", ranks, ", bias ", bias.value_or(0)));
        const Outcome got = RunCase(c, in);
        for (const auto& [output, vec] : kOutputs) {
          EXPECT_LT(RelMax(got.*vec, expected.*vec), 1e-12) << output;
        }
      }
    }
  }
}

// Tiles so rare that some ranks see nothing at all: their outputs and gradients are 0, and they
// still take part in every exchange.
TEST(StrategySigmoidTest, RanksThatSeeNothing) {
  const int ranks = 4;
  const int64_t length = 512;
  const auto rare = ops::AttentionPattern::RandomBlocks(
      {.density = 0.06, .seed = 3, .per_head = true, .own_block = false});
  const auto documents =
      std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(1, length));
  const Placement placement(PlacementKind::kContiguous, 1, length, ranks);
  int64_t blind = 0, pairs = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    const auto plan = MakePlan(rare, kKvHeads, documents, placement, StrategyKind::kRing, rank);
    blind += plan->VisiblePairs() == 0;
    pairs += plan->VisiblePairs();
  }
  ASSERT_GT(blind, 0);
  ASSERT_GT(pairs, 0);
  const Tensors in = Inputs(length, DType::kF64);
  StrategyCase c{"rare", rare, {{length}}, length, PlacementKind::kContiguous, StrategyKind::kRing,
                 1};
  c.options = Sigmoid();
  const Outcome one = RunCase(c, in);
  c.ranks = ranks;
  for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
    c.strategy = strategy;
    const Outcome got = RunCase(c, in);
    for (const auto& [output, vec] : kOutputs) {
      EXPECT_LT(RelMax(got.*vec, one.*vec), 1e-12) << output << " " << ToString(strategy);
    }
  }
}

// RunCase compares what is sent with PlannedTraffic; here that is counted by hand.
TEST(StrategyTest, Bf16SendsKeysInTwoBytesAndTheirGradientsInFour) {
  const int64_t tokens = 512 / 4, elements = 2 * tokens * kKvHeads * kDim;
  auto documents = std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(1, 512));
  const Placement placement(PlacementKind::kZigzag, 1, 512, 4);
  for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
    const auto plan = MakePlan(ops::AttentionPattern::Causal(), kKvHeads, documents, placement,
                               strategy, /*rank=*/1);
    const auto traffic = PlannedTraffic(*plan, tokens, kKvHeads, kDim, DType::kBF16);
    // The backward pass of the ring starts from the keys that the forward pass received last.
    const int64_t key_steps = strategy == StrategyKind::kRing ? 2 : 3;
    EXPECT_EQ(traffic.forward_bytes, 3 * 2 * elements) << ToString(strategy);
    EXPECT_EQ(traffic.backward_bytes, (key_steps * 2 + 3 * 4) * elements) << ToString(strategy);
  }
}

TEST(StrategyTest, PlanOfAnotherRankIsRefused) {
  Context ctx(ContextOptions{.threads = 1});
  auto documents = std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(1, 256));
  const Placement placement(PlacementKind::kZigzag, 1, 256, 2);
  const auto plan =
      MakePlan(ops::AttentionPattern::Causal(), 1, documents, placement, StrategyKind::kRing, 1);
  auto self = std::make_unique<SelfCommunicator>();
  const Tensor q = ctx.Zeros({128, 1, 8}, DType::kF64);
  EXPECT_THROW(ContextAttentionForward(ctx, *self, *plan, q, q, q), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
