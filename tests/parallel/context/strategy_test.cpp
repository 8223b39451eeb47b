// Every strategy x placement x pattern x rank count equals attention on one rank, in f64, forward
// and backward, and sends exactly the bytes that the plan says.
#include "parallel/context/strategy.h"

#include <gtest/gtest.h>

#include "ops/core/rng.h"
#include "parallel/comm/self.h"
#include "tests/parallel/context/strategy_cases.h"

namespace longspan::test {
namespace {

using namespace parallel;

// The full product for `ranks`; `sample` keeps one case in that many, chosen by a fixed seed.
void RunProduct(const std::vector<int>& rank_counts, uint64_t sample) {
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
          const int64_t tokens = length * static_cast<int64_t>(layouts[layout].size());
          std::unique_ptr<Outcome> expected;
          Tensors in;
          for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
            if (rng.Below(index++, sample) != 0) continue;
            if (expected == nullptr) {
              in = Inputs(tokens, DType::kF64);
              expected = std::make_unique<Outcome>(RunCase(truth, in));
            }
            const StrategyCase c{name,     pattern, layouts[layout], length, placement,
                                 strategy, ranks};
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

TEST(PlacementTest, ZigzagPairsEarlyAndLateParts) {
  const Placement p(PlacementKind::kZigzag, 2, 512, 2);
  EXPECT_EQ(p.parts(0), (std::vector<TokenRange>{{0, 128}, {384, 512}}));
  EXPECT_EQ(p.parts(1), (std::vector<TokenRange>{{128, 256}, {256, 384}}));
  EXPECT_EQ(p.blocks(0).ids, (std::vector<int32_t>{0, 1, 6, 7, 8, 9, 14, 15}));
}

TEST(PlacementTest, EveryTokenHasOneOwner) {
  for (PlacementKind kind : {PlacementKind::kContiguous, PlacementKind::kZigzag}) {
    const Placement p(kind, 3, 128 * 3, 3);
    std::vector<int> owners(static_cast<size_t>(3 * 128 * 3));
    std::vector<int64_t> index(owners.size());
    for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i);
    for (int r = 0; r < 3; ++r) {
      for (int64_t t : p.Slice(index, r)) ++owners[static_cast<size_t>(t)];
    }
    for (int n : owners) EXPECT_EQ(n, 1);
  }
}

TEST(PlacementTest, ProblemNamesUsableLengths) {
  const std::string text = Placement::Problem(PlacementKind::kZigzag, 1000, 2);
  EXPECT_NE(text.find("768"), std::string::npos) << text;
  EXPECT_NE(text.find("1024"), std::string::npos) << text;
  EXPECT_EQ(Placement::Problem(PlacementKind::kContiguous, 1000, 1), "");
}

}  // namespace
}  // namespace longspan::test
