// Placement, demand and plans of whole micro-batches: the same on all ranks, other for other
// documents, and made in less time than any step takes.
#include "trainer/batch_plans.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "ops/core/rng.h"

namespace longspan::test {
namespace {

using namespace trainer;
using parallel::PlacementKind;
using parallel::StrategyKind;

ModelOptions MixedModel() {
  ModelOptions m;
  m.num_heads = 16, m.num_kv_heads = 8, m.head_dim = 64;
  m.mixers.resize(4);
  m.mixers[0] = {.name = "dense", .pattern = ops::AttentionPattern::Causal()};
  m.mixers[1] = {.name = "s2",
                 .pattern = ops::AttentionPattern::S2(
                     {.block_size = 64, .local_blocks = 16, .stride_blocks = 8})};
  m.mixers[2] = {.name = "window", .pattern = ops::AttentionPattern::Window(1024, 64)};
  m.mixers[3] = {.name = "prefix", .pattern = ops::AttentionPattern::Prefix(9000)};
  m.layers = {0, 1, 1, 1, 2, 2, 2, 3};
  return m;
}

ContextLayout LayoutOf(PlacementKind placement, StrategyKind strategy, int64_t length,
                       int64_t ranks) {
  ContextLayout layout{.placement = placement, .rows = 1, .row_length = length, .ranks = ranks};
  layout.strategy.kind = strategy;
  layout.network.intra = layout.network.inter = {1e-5, 4e9};
  layout.network.flops_per_s = 1e11;
  return layout;
}

// Documents of very different lengths, other ones for every seed.
std::shared_ptr<const ops::Documents> RandomDocuments(int64_t length, uint64_t seed) {
  const Philox rng(seed, StreamOf("documents"));
  std::vector<int64_t> ends;
  uint64_t i = 0;
  for (int64_t at = 0; at < length;) {
    const auto longest = int64_t{64} << rng.Below(i++, 10);
    at += 1 + static_cast<int64_t>(rng.Below(i++, static_cast<uint64_t>(longest)));
    ends.push_back(std::min(at, length));
  }
  return std::make_shared<const ops::Documents>(ops::Documents::FromEnds(length, {ends}));
}

TEST(BatchPlansTest, AllRanksAgreeAndOtherDocumentsDiffer) {
  const int64_t length = 8192, ranks = 4;
  for (const auto strategy : {StrategyKind::kExchange, StrategyKind::kAuto}) {
    for (const auto placement : {PlacementKind::kZigzag, PlacementKind::kBalanced}) {
      const ContextLayout layout = LayoutOf(placement, strategy, length, ranks);
      std::vector<uint64_t> hashes;
      double pairs = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        BatchPlanner planner(MixedModel(), layout, rank);
        const auto one = planner.PlansFor(RandomDocuments(length, 1));
        const auto other = planner.PlansFor(RandomDocuments(length, 2));
        EXPECT_NE(one->hash, other->hash);
        EXPECT_EQ(planner.PlansFor(RandomDocuments(length, 1)), one) << "kept, not made again";
        EXPECT_EQ(one->placement->local_tokens(rank), length / ranks);
        EXPECT_GE(one->work_max, one->work_mean);
        EXPECT_NE(one->plans[0]->strategy, StrategyKind::kAuto);
        hashes.push_back(one->hash);
        pairs += one->attention_pairs;
      }
      for (const uint64_t hash : hashes) EXPECT_EQ(hash, hashes[0]);
      // What all ranks compute is what one rank would.
      BatchPlanner alone(MixedModel(), LayoutOf(placement, strategy, length, 1), 0);
      EXPECT_EQ(pairs, alone.PlansFor(RandomDocuments(length, 1))->attention_pairs);
    }
  }
}

// Ranks that differ in anything which decides who sends what must notice.
TEST(BatchPlansTest, TheFingerprintIsOfEverythingThatIsPlanned) {
  const int64_t length = 4096;
  const auto documents = RandomDocuments(length, 1);
  ModelOptions model = MixedModel();
  model.mixers[0].duo = {.sinks = 64, .recent = 128};
  model.mixers[3] = {.name = "moba", .moba = ops::MobaOptions{.block_size = 128, .top_k = 3}};
  ContextLayout layout = LayoutOf(PlacementKind::kZigzag, StrategyKind::kExchange, length, 4);
  const auto hash = [&] { return BatchPlanner(model, layout, 1).PlansFor(documents)->hash; };
  std::vector<uint64_t> hashes = {hash()};
  EXPECT_EQ(hash(), hashes[0]);
  model.mixers[0].duo->recent = 256;
  hashes.push_back(hash());
  model.mixers[3].moba->top_k = 4;
  hashes.push_back(hash());
  model.mixers[2].pattern = ops::AttentionPattern::Window(1025, 64);
  hashes.push_back(hash());
  layout.placement = PlacementKind::kStriped;
  hashes.push_back(hash());
  layout.strategy.stages = 3;
  hashes.push_back(hash());
  std::ranges::sort(hashes);
  EXPECT_EQ(std::ranges::adjacent_find(hashes), hashes.end());
}

TEST(BatchPlansTest, BalancedIsMoreEvenThanZigzag) {
  const int64_t length = 16384, ranks = 8;
  const auto documents = RandomDocuments(length, 3);
  const auto unevenness = [&](PlacementKind placement) {
    BatchPlanner planner(MixedModel(), LayoutOf(placement, StrategyKind::kExchange, length, ranks),
                         0);
    const auto plans = planner.PlansFor(documents);
    return plans->work_max / plans->work_mean;
  };
  const double balanced = unevenness(PlacementKind::kBalanced);
  const double zigzag = unevenness(PlacementKind::kZigzag);
  std::printf("work max / mean, layer by layer: zigzag %.3f, balanced %.3f\n", zigzag, balanced);
  EXPECT_LT(balanced, zigzag);
}

// A row of 131072 tokens on 8 ranks with new documents in every step. The bound is far above what
// it takes, for machines that are busy; a step of such a row takes seconds on any device.
TEST(BatchPlansTest, NewDocumentsEveryStepArePlannedInTime) {
  const int64_t length = 131072, ranks = 8;
  for (const auto strategy : {StrategyKind::kExchange, StrategyKind::kAuto}) {
    BatchPlanner planner(MixedModel(), LayoutOf(PlacementKind::kBalanced, strategy, length, ranks),
                         3);
    double slowest_ms = 0;
    for (uint64_t seed = 10; seed < 13; ++seed) {
      const auto documents = RandomDocuments(length, seed);
      const auto start = std::chrono::steady_clock::now();
      planner.PlansFor(documents);
      const std::chrono::duration<double, std::milli> took =
          std::chrono::steady_clock::now() - start;
      slowest_ms = std::max(slowest_ms, took.count());
    }
    std::printf("placement, masks and plans of 4 kinds of layers, %s: at most %.0f ms\n",
                ToString(strategy), slowest_ms);
    EXPECT_LT(slowest_ms, 5000);
  }
}

TEST(BatchPlansTest, RefusesAStrategyThatDoesNotFit) {
  ContextLayout layout = LayoutOf(PlacementKind::kZigzag, StrategyKind::kDoubleRing, 4096, 4);
  layout.strategy.ranks_per_node = 3;
  EXPECT_THROW(BatchPlanner(MixedModel(), layout, 0), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
