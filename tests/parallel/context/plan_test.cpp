// The front door of plans: what is refused, what figures say, hashes that ranks compare, the choice
// of a strategy, and how long planning takes.
#include "parallel/context/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <set>

#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/context/choose.h"
#include "parallel/context/strategy.h"

namespace longspan::test {
namespace {

using namespace parallel;

std::shared_ptr<const ops::Documents> DocumentsOf(int64_t length, std::vector<int64_t> ends) {
  return std::make_shared<const ops::Documents>(
      ops::Documents::FromEnds(length, {std::move(ends)}));
}
std::shared_ptr<const Placement> Zigzag(int64_t length, int ranks) {
  return std::make_shared<const Placement>(PlacementKind::kZigzag, 1, length, ranks);
}

constexpr StrategyKind kKinds[] = {StrategyKind::kRing,      StrategyKind::kDoubleRing,
                                   StrategyKind::kAllGather, StrategyKind::kUlysses,
                                   StrategyKind::kHybrid,    StrategyKind::kExchange};

// ---- what is refused --------------------------------------------------------------------------

std::string MessageOf(const StrategyOptions& options) {
  try {
    MakePlan(ops::AttentionPattern::Causal(), 2, DocumentsOf(512, {512}), Zigzag(512, 4), options,
             0);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

TEST(PlanTest, ImpossibleOptionsAreNamed) {
  const std::pair<StrategyOptions, const char*> cases[] = {
      {{.kind = StrategyKind::kAuto}, "strategy AUTO has no plan of its own"},
      {{.kind = StrategyKind::kUlysses, .heads = 3}, "heads is 3; it must be a multiple of the 2"},
      {{.kind = StrategyKind::kExchange, .stages = -1}, "stages is -1"},
      {{.kind = StrategyKind::kAllGather, .head_groups = -2}, "head_groups is -2"},
      {{.kind = StrategyKind::kExchange, .keep_rows = -1}, "keep_rows is -1"},
      {{.kind = StrategyKind::kRing, .ranks_per_node = -1}, "ranks_per_node is -1"},
      {{.kind = StrategyKind::kDoubleRing, .ranks_per_node = 3}, "4 ranks are no multiple"},
      {{.kind = StrategyKind::kHybrid, .ulysses_ranks = 3}, "ulysses_ranks is 3; it must divide"},
      {{.kind = StrategyKind::kHybrid, .outer = StrategyKind::kUlysses}, "outer is ULYSSES"}};
  for (const auto& [options, text] : cases) {
    EXPECT_NE(MessageOf(options).find(text), std::string::npos)
        << "'" << MessageOf(options) << "' without '" << text << "'";
  }
  for (const StrategyKind kind : kKinds) EXPECT_EQ(MessageOf({.kind = kind}), "") << ToString(kind);
}

// ---- figures ----------------------------------------------------------------------------------

TEST(PlanTest, WhatIsSentIsReceivedAndCoversTheBound) {
  const int64_t length = 64 * 20, kv_heads = 4;
  const auto pattern = ops::AttentionPattern::S2(
      {.block_size = 64, .local_blocks = 2, .stride_blocks = 4, .dense_heads = 0});
  const auto demand = ContextDemand::Build(pattern, kv_heads, DocumentsOf(length, {300, length}),
                                           Zigzag(length, 6));
  for (const StrategyKind kind : kKinds) {
    const PlanMaker maker(demand, {.kind = kind, .heads = 8, .ranks_per_node = 3});
    PlanFigures sum;
    double work = 0, largest = 0;
    int64_t pairs = 0;
    for (int r = 0; r < 6; ++r) {
      const auto plan = maker.Build(r);
      const PlanFigures& f = plan->figures;
      sum.forward_sent_rows += f.forward_sent_rows;
      sum.forward_received_rows += f.forward_received_rows;
      sum.backward_sent_rows += f.backward_sent_rows;
      sum.backward_received_rows += f.backward_received_rows;
      sum.grad_sent_rows += f.grad_sent_rows;
      sum.grad_received_rows += f.grad_received_rows;
      EXPECT_EQ(f.lower_bound_rows, demand->LowerBoundRows(r));
      if (plan->ulysses == nullptr) {  // queries at home
        EXPECT_GE(f.forward_received_rows, f.lower_bound_rows) << ToString(kind) << " rank " << r;
        EXPECT_EQ(plan->forward.VisiblePairs(), plan->VisiblePairs()) << ToString(kind);
        EXPECT_EQ(plan->backward.VisiblePairs(), plan->VisiblePairs()) << ToString(kind);
        work += static_cast<double>(plan->VisiblePairs());
        largest = std::max(largest, static_cast<double>(plan->VisiblePairs()));
      }
      pairs += plan->VisiblePairs();
    }
    const auto any = maker.Build(0);
    EXPECT_EQ(sum.forward_sent_rows, sum.forward_received_rows) << ToString(kind);
    EXPECT_EQ(sum.backward_sent_rows, sum.backward_received_rows) << ToString(kind);
    EXPECT_EQ(sum.grad_sent_rows, sum.grad_received_rows) << ToString(kind);
    // All pairs are computed once, wherever: 8 query heads over 4 kv heads halve to `pairs`.
    EXPECT_NEAR(any->figures.work_mean * 6, static_cast<double>(pairs), 1e-6) << ToString(kind);
    if (work > 0) {
      EXPECT_EQ(any->figures.work_max, largest) << ToString(kind);
    }
  }
}

// ---- hashes -----------------------------------------------------------------------------------

uint64_t HashOf(const ops::AttentionPattern& pattern, int64_t kv_heads, std::vector<int64_t> ends,
                const Placement& placement, const StrategyOptions& options, int rank) {
  return MakePlan(pattern, kv_heads, DocumentsOf(1024, std::move(ends)), placement, options, rank)
      ->figures.hash;
}

TEST(PlanTest, HashesDependOnAllThatRanksMustShareAndOnNothingElse) {
  const auto causal = ops::AttentionPattern::Causal();
  const Placement zigzag(PlacementKind::kZigzag, 1, 1024, 4);
  const StrategyOptions ring{.kind = StrategyKind::kExchange};
  std::set<uint64_t> all;
  for (int r = 0; r < 4; ++r) all.insert(HashOf(causal, 2, {1024}, zigzag, ring, r));
  EXPECT_EQ(all.size(), 1u);
  const auto differs = [&](uint64_t hash) { EXPECT_TRUE(all.insert(hash).second); };
  differs(HashOf(causal, 4, {1024}, zigzag, ring, 0));
  differs(HashOf(causal, 2, {1000, 1024}, zigzag, ring, 0));
  differs(HashOf(causal, 2, {1001, 1024}, zigzag, ring, 0));
  differs(HashOf(ops::AttentionPattern::Window(100), 2, {1024}, zigzag, ring, 0));
  differs(HashOf(ops::AttentionPattern::Window(101), 2, {1024}, zigzag, ring, 0));
  differs(HashOf(causal, 2, {1024}, Placement(PlacementKind::kContiguous, 1, 1024, 4), ring, 0));
  for (StrategyOptions o :
       {StrategyOptions{.kind = StrategyKind::kRing},
        StrategyOptions{.kind = StrategyKind::kExchange, .heads = 4},
        StrategyOptions{.kind = StrategyKind::kExchange, .ranks_per_node = 2},
        StrategyOptions{.kind = StrategyKind::kExchange, .stages = 3},
        StrategyOptions{.kind = StrategyKind::kExchange, .keep_rows = 9},
        StrategyOptions{.kind = StrategyKind::kExchange, .deduplicate = false},
        StrategyOptions{.kind = StrategyKind::kAllGather},
        StrategyOptions{.kind = StrategyKind::kAllGather, .head_groups = 1},
        StrategyOptions{.kind = StrategyKind::kHybrid},
        StrategyOptions{.kind = StrategyKind::kHybrid, .ulysses_ranks = 2},
        StrategyOptions{.kind = StrategyKind::kHybrid, .outer = StrategyKind::kExchange}}) {
    differs(HashOf(causal, 2, {1024}, zigzag, o, 0));
  }
}

TEST(PlanTest, RanksWithOtherPlansAreNamedOnEveryRank) {
  const auto plan_of = [](int rank, int64_t document) {
    return MakePlan(ops::AttentionPattern::Causal(), 2, DocumentsOf(640, {document, 640}),
                    Zigzag(640, 5), {.kind = StrategyKind::kExchange}, rank);
  };
  std::mutex mutex;
  std::vector<std::string> messages;
  RunLocal(5, [&](Communicator& world) {
    CountingCommunicator comm(world);
    CheckSamePlan(comm, *plan_of(comm.rank(), 100));  // alike: nothing happens
    EXPECT_EQ(comm.counts().Total().bytes, 0) << "what ranks compare is no payload";
    EXPECT_GT(comm.counts().control.bytes, 0);
    try {
      CheckSamePlan(comm, *plan_of(comm.rank(), comm.rank() == 1 || comm.rank() == 3 ? 101 : 100));
    } catch (const CommError& e) {
      const std::lock_guard lock(mutex);
      messages.emplace_back(e.what());
    }
    comm.Barrier();  // everybody is still there
  });
  ASSERT_EQ(messages.size(), 5u);
  for (const std::string& m : messages) {
    EXPECT_NE(m.find("rank 1, 3 of 5 differ from the others"), std::string::npos) << m;
  }
}

// ---- the choice -------------------------------------------------------------------------------

NetworkOptions Network(double bytes_per_s, int ranks_per_node = 0) {
  NetworkOptions network{.intra = {1e-5, bytes_per_s},
                         .inter = {2e-5, bytes_per_s / 8},
                         .ranks_per_node = ranks_per_node};
  network.flops_per_s = 1e12;
  return network;
}

TEST(ChooseTest, TheCheapestForecastWinsAndEveryRankSaysSo) {
  const int64_t length = 64 * 64;
  const PlanSizes sizes{.heads = 8, .head_dim = 64, .dtype = DType::kBF16};
  for (const auto& pattern :
       {ops::AttentionPattern::Causal(), ops::AttentionPattern::Window(512),
        ops::AttentionPattern::S2({.block_size = 64, .local_blocks = 4, .stride_blocks = 4})}) {
    const auto demand =
        ContextDemand::Build(pattern, 4, DocumentsOf(length, {length}), Zigzag(length, 8));
    for (const double rate : {1e8, 1e10, 1e12}) {
      std::vector<StrategyForecast> forecasts, again;
      const StrategyOptions chosen = ChooseStrategy(demand, {.kind = StrategyKind::kAuto}, sizes,
                                                    Network(rate, 4), &forecasts);
      ASSERT_GE(forecasts.size(), 8u);
      const auto best =
          std::min_element(forecasts.begin(), forecasts.end(),
                           [](const auto& a, const auto& b) { return a.seconds() < b.seconds(); });
      EXPECT_EQ(chosen, best->options);
      EXPECT_TRUE(chosen.Problems(4, 8).empty());
      EXPECT_EQ(chosen.heads, 8);
      EXPECT_EQ(chosen, ChooseStrategy(demand, {.kind = StrategyKind::kAuto}, sizes,
                                       Network(rate, 4), &again));
      for (size_t i = 0; i < forecasts.size(); ++i) {
        EXPECT_EQ(forecasts[i].seconds(), again[i].seconds());
        EXPECT_GT(forecasts[i].forward_s, 0);
        EXPECT_GT(forecasts[i].backward_s, forecasts[i].forward_s);
      }
    }
  }
}

TEST(ChooseTest, SparseMasksOnSlowLinksTakeWhatFollowsTheMask) {
  const int64_t length = 64 * 128;
  const PlanSizes sizes{.heads = 8, .head_dim = 64, .dtype = DType::kBF16};
  const auto window = ContextDemand::Build(
      ops::AttentionPattern::Window(128), 8, DocumentsOf(length, {length}),
      std::make_shared<const Placement>(PlacementKind::kContiguous, 1, length, 8));
  EXPECT_EQ(ChooseStrategy(window, {.kind = StrategyKind::kAuto}, sizes, Network(1e8)).kind,
            StrategyKind::kExchange);
  // Told what to do, it does not look further.
  EXPECT_EQ(ChooseStrategy(window, {.kind = StrategyKind::kRing}, sizes, Network(1e8)),
            (StrategyOptions{.kind = StrategyKind::kRing}));
}

TEST(ChooseTest, CandidatesFitTheRanks) {
  const auto kinds = [](const std::vector<StrategyOptions>& candidates) {
    std::set<StrategyKind> set;
    for (const StrategyOptions& o : candidates) set.insert(o.kind);
    return set;
  };
  const StrategyOptions any{.kind = StrategyKind::kAuto, .heads = 8};
  const auto two = kinds(StrategyCandidates(any, 4, 2, Network(1e9)));
  EXPECT_EQ(two, (std::set<StrategyKind>{StrategyKind::kRing, StrategyKind::kAllGather,
                                         StrategyKind::kUlysses, StrategyKind::kExchange}));
  const auto nodes = kinds(StrategyCandidates(any, 4, 8, Network(1e9, 4)));
  EXPECT_TRUE(nodes.contains(StrategyKind::kDoubleRing));
  EXPECT_TRUE(nodes.contains(StrategyKind::kHybrid));
  for (const StrategyOptions& o : StrategyCandidates(any, 4, 8, Network(1e9, 4))) {
    EXPECT_EQ(o.ranks_per_node, 4);
    EXPECT_NE(o.kind, StrategyKind::kAuto);
  }
}

// ---- time -------------------------------------------------------------------------------------

TEST(PlanTimeTest, AMillionTokensOnAThousandRanksTakeLessThanASecondAPattern) {
  const int64_t length = 1 << 20, kv_heads = 8;
  const auto documents = DocumentsOf(length, {100000, 400001, length});
  const auto placement = std::make_shared<const Placement>(PlacementKind::kZigzag, 1, length, 1024);
  const std::pair<const char*, ops::AttentionPattern> patterns[] = {
      {"causal", ops::AttentionPattern::Causal()},
      {"window", ops::AttentionPattern::Window(4096, 64)},
      {"s2", ops::AttentionPattern::S2({.block_size = 64, .local_blocks = 16, .stride_blocks = 8})},
      {"power", ops::AttentionPattern::Power({64, 4, 1})},
      {"random", ops::AttentionPattern::RandomBlocks({.density = 0.01})}};
  for (const auto& [name, pattern] : patterns) {
    for (const StrategyKind kind :
         {StrategyKind::kRing, StrategyKind::kHybrid, StrategyKind::kExchange}) {
      const auto start = std::chrono::steady_clock::now();
      const auto plan = MakePlan(pattern, kv_heads, documents, placement,
                                 {.kind = kind, .heads = 64, .ranks_per_node = 8}, 500);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      std::printf("%-8s %-12s %6.0f ms, %lld rows received, bound %lld\n", name, ToString(kind),
                  1e3 * took.count(), static_cast<long long>(plan->figures.forward_received_rows),
                  static_cast<long long>(plan->figures.lower_bound_rows));
      // Distinct head patterns: S2 has one for each kv head. The factor is for loaded machines.
      const double seconds = std::string(name) == "s2" ? 8 : 1;
      EXPECT_LT(took.count(), 4 * seconds) << name << " " << ToString(kind);
    }
  }
}

}  // namespace
}  // namespace longspan::test
