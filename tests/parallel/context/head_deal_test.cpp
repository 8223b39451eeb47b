#include "parallel/context/head_deal.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>

#include "ops/core/rng.h"

namespace longspan::test {
namespace {

using namespace parallel;

int64_t WorkOf(const std::vector<int32_t>& queries, const std::vector<int64_t>& work,
               int64_t group) {
  int64_t sum = 0;
  for (const int32_t q : queries) sum += work[static_cast<size_t>(q / group)];
  return sum;
}

// (rank, kv head) pairs: how often keys are sent.
int64_t Holders(const HeadDeal& deal, int64_t group) {
  std::set<std::pair<size_t, int64_t>> held;
  for (size_t r = 0; r < deal.queries.size(); ++r) {
    for (const int32_t q : deal.queries[r]) held.emplace(r, q / group);
  }
  return static_cast<int64_t>(held.size());
}

// Every query head is dealt once, in ascending order, and work_max is right.
void ExpectWhole(const HeadDeal& deal, const std::vector<int64_t>& work, int64_t group) {
  std::vector<int32_t> all;
  int64_t most = 0;
  for (const auto& queries : deal.queries) {
    EXPECT_TRUE(std::is_sorted(queries.begin(), queries.end()));
    all.insert(all.end(), queries.begin(), queries.end());
    most = std::max(most, WorkOf(queries, work, group));
  }
  std::sort(all.begin(), all.end());
  std::vector<int32_t> expected(work.size() * static_cast<size_t>(group));
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(all, expected);
  EXPECT_EQ(deal.work_max, most);
}

// The least largest load over all ways to deal the query heads: exponential.
int64_t Optimum(const std::vector<int64_t>& work, int64_t group, int ranks) {
  std::vector<int64_t> heads;
  for (const int64_t w : work) heads.insert(heads.end(), static_cast<size_t>(group), w);
  std::vector<int64_t> load(static_cast<size_t>(ranks), 0);
  int64_t best = std::accumulate(heads.begin(), heads.end(), int64_t{0});
  const std::function<void(size_t)> place = [&](size_t i) {
    const int64_t most = *std::max_element(load.begin(), load.end());
    if (most >= best) return;
    if (i == heads.size()) {
      best = most;
      return;
    }
    for (int64_t& l : load) {
      l += heads[i];
      place(i + 1);
      l -= heads[i];
      if (l == 0) break;  // empty ranks are alike
    }
  };
  place(0);
  return best;
}

TEST(HeadDealTest, RandomWorkIsNearTheOptimum) {
  const uint64_t seed = 3;
  const Philox rng(seed, StreamOf("deals of heads"));
  uint64_t at = 0;
  for (int round = 0; round < 200; ++round) {
    const auto kv_heads = static_cast<size_t>(1 + rng.Below(at++, 4));
    const auto group = static_cast<int64_t>(1 + rng.Below(at++, kv_heads > 2 ? 2 : 4));
    const auto ranks = static_cast<int>(1 + rng.Below(at++, 6));
    std::vector<int64_t> work(kv_heads);
    for (int64_t& w : work) w = static_cast<int64_t>(rng.Below(at++, 1000));
    const HeadDeal deal = DealHeads(work, group, ranks);
    ExpectWhole(deal, work, group);
    const int64_t best = Optimum(work, group, ranks);
    // Moves and swaps leave little of the 4/3 of dealing the longest first.
    EXPECT_LE(deal.work_max * 100, best * 115) << "seed " << seed << " round " << round;
  }
}

TEST(HeadDealTest, EqualHeadsSendTheFewestKeys) {
  for (const auto& [kv_heads, group, ranks, holders] : {std::tuple{8, 2, 8, 8},
                                                        {8, 2, 4, 8},
                                                        {8, 2, 16, 16},
                                                        {2, 8, 8, 8},
                                                        {8, 1, 2, 8},
                                                        {4, 4, 8, 8},
                                                        {1, 6, 4, 3}}) {
    const std::vector<int64_t> work(static_cast<size_t>(kv_heads), 7);
    const HeadDeal deal = DealHeads(work, group, ranks);
    ExpectWhole(deal, work, group);
    EXPECT_EQ(Holders(deal, group), holders) << kv_heads << " x " << group << " on " << ranks;
    EXPECT_EQ(deal.work_max, 7 * ((kv_heads * group + ranks - 1) / ranks));
  }
}

// By number, the rank with the dense head would have twice the work of the others.
TEST(HeadDealTest, DenseHeadsAreSpreadByTheirWork) {
  const std::vector<int64_t> work = {10, 10, 10, 10, 10, 10, 10, 70};
  const HeadDeal deal = DealHeads(work, 2, 4);
  ExpectWhole(deal, work, 2);
  EXPECT_EQ(deal.work_max, 70);
}

// Dealing the longest first alone ends at 3 + 2 + 2.
TEST(HeadDealTest, SwapsEvenOutWhatDealingLeaves) {
  const std::vector<int64_t> work = {3, 3, 2, 2, 2};
  const HeadDeal deal = DealHeads(work, 1, 2);
  ExpectWhole(deal, work, 1);
  EXPECT_EQ(deal.work_max, 6);
}

// Keys are sent twice where that takes more than 1 % off the busiest rank, and not for less.
TEST(HeadDealTest, KvHeadsAreSplitWhereItPays) {
  const HeadDeal split = DealHeads(std::vector<int64_t>{100, 90}, 2, 2);
  EXPECT_EQ(split.work_max, 190);
  EXPECT_EQ(Holders(split, 2), 4);
  const HeadDeal whole = DealHeads(std::vector<int64_t>{1000, 995}, 2, 2);
  EXPECT_EQ(whole.work_max, 2000);
  EXPECT_EQ(Holders(whole, 2), 2);
}

TEST(HeadDealTest, MoreRanksThanHeadsLeaveSomeEmpty) {
  const HeadDeal deal = DealHeads(std::vector<int64_t>{5, 5}, 1, 5);
  ExpectWhole(deal, {5, 5}, 1);
  EXPECT_EQ(std::count(deal.queries.begin(), deal.queries.end(), std::vector<int32_t>{}), 3);
}

TEST(HeadStepsTest, WholeKvHeadsInOrderWithEvenWork) {
  const std::vector<int64_t> work = {10, 10, 40, 10, 10};
  const std::vector<int32_t> queries = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  const auto steps = HeadSteps(queries, work, 2, 3);
  EXPECT_EQ(steps, (std::vector<std::vector<int32_t>>{{0, 1, 2, 3}, {4, 5}, {6, 7, 8, 9}}));
  EXPECT_EQ(HeadSteps(queries, work, 2, 1), (std::vector<std::vector<int32_t>>{queries}));
  EXPECT_EQ(HeadSteps(queries, work, 2, 99).size(), 5u);
}

TEST(HeadStepsTest, OneKvHeadIsSplitByQueryHeads) {
  EXPECT_EQ(HeadSteps(std::vector<int32_t>{4, 5, 6}, std::vector<int64_t>{1, 9}, 4, 2),
            (std::vector<std::vector<int32_t>>{{4}, {5, 6}}));
  EXPECT_TRUE(HeadSteps({}, std::vector<int64_t>{1}, 1, 4).empty());
}

}  // namespace
}  // namespace longspan::test
