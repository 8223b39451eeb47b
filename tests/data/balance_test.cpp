// Rows and steps with even attention work: how documents are packed, ordered and dealt, and how
// even that is on a mix of lengths.
#include "data/balance.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>
#include <set>
#include <thread>

#include "data/sampler.h"
#include "ops/core/error.h"
#include "ops/core/rng.h"
#include "tests/data/data_support.h"

namespace longspan::test {
namespace {

using data::Piece;
using data::Row;
using data::RowSampler;
using data::RowSamplerOptions;
using Ids = std::vector<int32_t>;

// Pairs of a causal mask, counted token by token.
int64_t CountedArea(const Row& row) {
  int64_t area = 0;
  for (size_t i = 0, document = 0, begin = 0; i < row.tokens.size(); ++i) {
    if (static_cast<int64_t>(i) == row.doc_ends[document]) {
      begin = i;
      ++document;
    }
    area += static_cast<int64_t>(i - begin) + 1;
  }
  return area;
}

std::vector<int64_t> Areas(const std::vector<std::vector<Piece>>& rows) {
  std::vector<int64_t> areas;
  for (const auto& row : rows) {
    int64_t area = 0;
    for (const Piece& piece : row) area += piece.tokens * (piece.tokens + 1) / 2;
    areas.push_back(area);
  }
  return areas;
}

TEST(PackEvenlyTest, ByHand) {
  // 6 of the 10 are a row. Then 5, 4 and 4 begin a row each; 3 fits nowhere, so 2 of it fill the
  // row of the first 4; the ones go to the other 4, which has the least area, and then to the 5.
  const auto rows = data::PackEvenly({{0, 10}, {10, 5}, {15, 1}, {16, 4}, {20, 3}, {23, 1}}, 4, 6);
  EXPECT_EQ(rows,
            (std::vector<std::vector<Piece>>{
                {{0, 6}}, {{10, 5}, {23, 1}}, {{6, 4}, {20, 2}}, {{15, 1}, {16, 4}, {22, 1}}}));
  EXPECT_EQ(data::PackEvenly({{3, 4}}, 2, 2),
            (std::vector<std::vector<Piece>>{{{3, 2}}, {{5, 2}}}));
  EXPECT_THROW(data::PackEvenly({{0, 5}}, 2, 3), InvalidArgument);
}

// Lengths of every kind, also empty pieces, in a multiple of `unit`.
std::vector<Piece> RandomPieces(const Philox& rng, int64_t rows, int64_t length, int64_t unit) {
  std::vector<Piece> pieces;
  const int64_t total = rows * length / unit;
  int64_t used = 0;
  for (uint64_t n = 0; used < total; n += 2) {
    const auto most =
        static_cast<uint64_t>(rng.Below(n, 20) == 0 ? 3 * length / unit : length / unit / 3 + 1);
    const int64_t tokens = std::min(total - used, static_cast<int64_t>(rng.Below(n + 1, most + 1)));
    pieces.push_back({used * unit, tokens * unit});
    used += tokens;
  }
  return pieces;
}

TEST(PackEvenlyTest, RandomPiecesFillEveryRowOnce) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(Str("seed ", seed));
    const Philox rng(seed, StreamOf("pieces"));
    const int64_t unit = seed % 3 == 0 ? 64 : 1;
    const auto rows = 1 + static_cast<int64_t>(rng.Below(1000, 40));
    const int64_t length = unit * (1 + static_cast<int64_t>(rng.Below(1001, 300)));
    const std::vector<Piece> pieces = RandomPieces(rng, rows, length, unit);
    std::set<int64_t> begins, ends;  // of the pieces
    for (const Piece& p : pieces) begins.insert(p.begin), ends.insert(p.begin + p.tokens);
    const auto packed = data::PackEvenly(pieces, rows, length);
    ASSERT_EQ(static_cast<int64_t>(packed.size()), rows);
    std::map<int64_t, int64_t> parts;  // begin -> end
    int64_t cut = 0;
    for (const auto& row : packed) {
      int64_t tokens = 0, last = -1;
      for (const Piece& p : row) {
        ASSERT_GT(p.tokens, 0);
        ASSERT_EQ(p.tokens % unit, 0);
        ASSERT_GT(p.begin, last) << "in the order of the stream";
        last = p.begin;
        tokens += p.tokens;
        ASSERT_TRUE(parts.insert({p.begin, p.begin + p.tokens}).second);
        cut += !ends.contains(p.begin + p.tokens);
      }
      ASSERT_EQ(tokens, length);
    }
    int64_t at = 0;
    for (const auto& [begin, end] : parts) {
      ASSERT_EQ(begin, at) << "every token once";
      at = end;
    }
    EXPECT_EQ(at, rows * length);
    // No part crosses from one piece into the next.
    for (const auto& [begin, end] : parts) {
      ASSERT_EQ(begins.upper_bound(begin), begins.lower_bound(end)) << begin;
    }
    EXPECT_LT(cut, rows) << "one cut a row fills it";
    EXPECT_EQ(packed, data::PackEvenly(pieces, rows, length));
  }
}

TEST(PackEvenlyTest, EvenWhereThePiecesAllowIt) {
  const Philox rng(7, StreamOf("even"));
  std::vector<Piece> pieces;
  int64_t begin = 0;
  constexpr int64_t kLength = 4096, kRows = 64;
  for (uint64_t n = 0; begin < kRows * kLength; ++n) {
    const auto tokens =
        std::min(kRows * kLength - begin, 1 + static_cast<int64_t>(rng.Below(n, 700)));
    pieces.push_back({begin, tokens});
    begin += tokens;
  }
  const std::vector<int64_t> areas = Areas(data::PackEvenly(pieces, kRows, kLength));
  const auto [least, most] = std::minmax_element(areas.begin(), areas.end());
  EXPECT_LT(static_cast<double>(*most) / static_cast<double>(*least), 1.02);
}

TEST(OrderInRunsTest, RunsAreAlikeAndShuffled) {
  const Philox rng(3, StreamOf("areas"));
  std::vector<int64_t> areas;
  for (uint64_t i = 0; i < 100; ++i) areas.push_back(static_cast<int64_t>(rng.Below(i, 1000)));
  const std::vector<int64_t> order = data::OrderInRuns(areas, 8, 5);
  std::vector<int64_t> sorted = order, all(100);
  std::sort(sorted.begin(), sorted.end());
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(sorted, all);
  std::vector<int64_t> descending = areas, firsts;
  std::sort(descending.begin(), descending.end(), std::greater<>());
  std::multiset<std::vector<int64_t>> got, expected;
  for (size_t begin = 0; begin < 96; begin += 8) {
    std::vector<int64_t> run;
    for (size_t i = begin; i < begin + 8; ++i) run.push_back(areas[static_cast<size_t>(order[i])]);
    got.insert(run);
    expected.insert({descending.begin() + static_cast<int64_t>(begin),
                     descending.begin() + static_cast<int64_t>(begin) + 8});
    firsts.push_back(run.front());
  }
  EXPECT_EQ(got, expected) << "a run is eight neighbours of the sorted rows";
  EXPECT_FALSE(std::is_sorted(firsts.begin(), firsts.end(), std::greater<>()));
  for (size_t i = 96; i < 100; ++i) {
    EXPECT_EQ(areas[static_cast<size_t>(order[i])], descending[i]) << "what is left over";
  }
  EXPECT_NE(order, data::OrderInRuns(areas, 8, 6));
  EXPECT_EQ(order, data::OrderInRuns(areas, 8, 5));
  // Equal rows come in another order for another key, too.
  const std::vector<int64_t> equal(16, 1);
  EXPECT_NE(data::OrderInRuns(equal, 16, 1), data::OrderInRuns(equal, 16, 2));
  EXPECT_TRUE(data::OrderInRuns({}, 8, 1).empty());
  EXPECT_EQ(data::OrderInRuns(std::vector<int64_t>{3, 9}, 8, 1), (std::vector<int64_t>{1, 0}));
}

TEST(DealRowsTest, ByHand) {
  // Two replicas, micro-batches of one: 9 | 8, then the lighter replica gets 7 | 3, then 2 | 1.
  EXPECT_EQ(data::DealRows(std::vector<int64_t>{1, 9, 3, 8, 7, 2}, 2, 1),
            (std::vector<int64_t>{1, 3, 2, 4, 5, 0}));
  EXPECT_EQ(data::DealRows(std::vector<int64_t>{1, 9, 3, 8}, 1, 2),
            (std::vector<int64_t>{1, 3, 2, 0}));
  EXPECT_EQ(data::DealRows(std::vector<int64_t>{5, 5, 5, 5}, 2, 2),
            (std::vector<int64_t>{0, 2, 1, 3}));
  EXPECT_THROW(data::DealRows(std::vector<int64_t>{1, 2, 3}, 2, 1), InvalidArgument);
}

TEST(DealRowsTest, EveryRowOnceAndNoReplicaFarAhead) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    SCOPED_TRACE(Str("seed ", seed));
    const Philox rng(seed, StreamOf("deal"));
    const auto replicas = 1 + static_cast<int64_t>(rng.Below(0, 8)),
               rows = 1 + static_cast<int64_t>(rng.Below(1, 3)),
               micro_batches = 1 + static_cast<int64_t>(rng.Below(2, 6));
    std::vector<int64_t> areas;
    for (int64_t i = 0; i < replicas * rows * micro_batches; ++i) {
      areas.push_back(static_cast<int64_t>(rng.Below(3 + static_cast<uint64_t>(i), 1000)));
    }
    const std::vector<int64_t> order = data::DealRows(areas, replicas, rows);
    std::vector<int64_t> sorted = order, all(areas.size()), total(static_cast<size_t>(replicas));
    std::sort(sorted.begin(), sorted.end());
    std::iota(all.begin(), all.end(), 0);
    ASSERT_EQ(sorted, all);
    for (size_t i = 0; i < order.size(); ++i) {
      const auto place = static_cast<int64_t>(i) / rows % replicas;
      total[static_cast<size_t>(place)] += areas[static_cast<size_t>(order[i])];
    }
    const auto [least, most] = std::minmax_element(total.begin(), total.end());
    const int64_t largest = *std::max_element(areas.begin(), areas.end());
    EXPECT_LE(*most - *least, largest * rows) << "at most one micro-batch apart";
  }
}

class BalancedRowsTest : public testing::Test {
 protected:
  // 60 % of the documents have 1 .. length / 2 tokens, 40 % the lengths of a heavy tail (Pareto,
  // alpha 1.2, from length / 32 on) up to 4 rows. Ids count up: an id tells its place.
  Documents WriteMix(int64_t length, int64_t tokens, uint64_t seed) const {
    const Philox rng(seed, StreamOf("length mix"));
    Documents documents;
    int32_t first = 0;
    for (uint64_t n = 0; first < tokens; n += 2) {
      const double u = rng.Uniform(n + 1);
      const double tail = static_cast<double>(length) / 32 / std::pow(1 - u, 1 / 1.2);
      const int64_t size = rng.Uniform(n) < 0.4
                               ? std::min<int64_t>(4 * length, std::llround(tail))
                               : 1 + static_cast<int64_t>(u * static_cast<double>(length / 2));
      Ids ids(static_cast<size_t>(size));
      std::iota(ids.begin(), ids.end(), first);
      first += static_cast<int32_t>(size);
      documents.push_back(std::move(ids));
    }
    WriteDataset(temp_ / "mix", documents);
    return documents;
  }
  RowSamplerOptions Options(int64_t length, bool balanced) const {
    RowSamplerOptions options;
    options.sources = {{temp_ / "mix", 1}};
    options.context_length = length;
    options.balanced = balanced;
    return options;
  }
  const TempFolder temp_;
};

struct EpochTokens {
  std::vector<bool> ids;  // those that occur
  int64_t count = 0;      // of them
  int64_t cut = 0;        // documents in rows whose end is not that of a document
};

// Checks one epoch by the ids alone: rows are full, documents in them are parts of documents, every
// token occurs once and predicts its successor unless it ends its document.
EpochTokens CheckEpoch(const RowSampler& sampler, int64_t epoch, int64_t length, int64_t alignment,
                       const Documents& documents) {
  std::vector<bool> starts, ends;
  for (const Ids& ids : documents) {
    for (size_t i = 0; i < ids.size(); ++i) {
      starts.push_back(i == 0);
      ends.push_back(i + 1 == ids.size());
    }
  }
  EpochTokens seen;
  seen.ids.resize(ends.size());
  const int64_t rows = sampler.RowsAvailable();
  for (int64_t r = 0; r < rows; ++r) {
    const Row row = sampler.Get(epoch * rows + r);
    EXPECT_EQ(sampler.Area(epoch * rows + r), CountedArea(row)) << r;
    EXPECT_EQ(static_cast<int64_t>(row.tokens.size()), length);
    EXPECT_EQ(row.doc_ends.back(), length);
    int64_t begin = 0;
    for (const int64_t end : row.doc_ends) {
      const bool padding = begin % alignment != 0;
      for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
        const int32_t id = row.tokens[i];
        EXPECT_EQ(row.positions[i], static_cast<int64_t>(i) - begin);
        if (padding) {
          EXPECT_EQ(row.labels[i], data::kNoLabel);
          continue;
        }
        EXPECT_EQ(id, row.tokens[static_cast<size_t>(begin)] + static_cast<int32_t>(i) - begin);
        EXPECT_FALSE(seen.ids[static_cast<size_t>(id)]) << "token " << id << " occurs twice";
        seen.ids[static_cast<size_t>(id)] = true;
        ++seen.count;
        const bool last = ends[static_cast<size_t>(id)];
        EXPECT_EQ(row.labels[i], last ? data::kNoLabel : id + 1) << "row " << r << " token " << i;
        EXPECT_TRUE(static_cast<int64_t>(i) == begin || !starts[static_cast<size_t>(id)]);
        seen.cut += static_cast<int64_t>(i) + 1 == end && !last;
      }
      if (testing::Test::HasFailure()) return seen;
      begin = end;
    }
  }
  return seen;
}

TEST_F(BalancedRowsTest, AnEpochHasTheTokensOfGreedyRows) {
  for (const int64_t length : {64, 192}) {
    const Documents documents = WriteMix(length, length * 700, 3);  // two stretches
    for (const int64_t alignment : {1, 64}) {
      RowSamplerOptions greedy = Options(length, false), balanced = Options(length, true);
      greedy.alignment = balanced.alignment = alignment;
      const RowSampler in_order(greedy), even(balanced);
      ASSERT_EQ(even.RowsAvailable(), in_order.RowsAvailable());
      ASSERT_GT(even.RowsAvailable(), 512);
      EXPECT_EQ(even.Fingerprint(), in_order.Fingerprint());
      for (const int64_t epoch : {0, 1, 5}) {
        SCOPED_TRACE(Str("length ", length, " alignment ", alignment, " epoch ", epoch));
        const EpochTokens a = CheckEpoch(in_order, epoch, length, alignment, documents);
        const EpochTokens b = CheckEpoch(even, epoch, length, alignment, documents);
        EXPECT_TRUE(a.ids == b.ids);
        EXPECT_GT(b.count, static_cast<int64_t>(b.ids.size()) - 2 * length);
        EXPECT_LT(b.cut, a.cut + (length == alignment)) << "fewer documents are cut";
      }
    }
  }
}

TEST_F(BalancedRowsTest, RandomAccessGivesWhatReadingInOrderGave) {
  WriteMix(48, 48 * 1300, 5);
  RowSamplerOptions options = Options(48, true);
  const RowSampler sampler(options), again(options);
  const int64_t rows = sampler.RowsAvailable();
  ASSERT_GT(rows, 2 * 512);
  std::vector<Ids> expected;
  for (int64_t i = 0; i < 2 * rows; ++i) expected.push_back(sampler.Get(i).tokens);
  for (int64_t i = 2 * rows - 1; i >= 0; i -= 37) {
    ASSERT_EQ(again.Get(i).tokens, expected[static_cast<size_t>(i)]);
    if (i % 5 == 0) again.Get(i * 1000);
  }
  EXPECT_NE(std::vector(expected.begin(), expected.begin() + rows),
            std::vector(expected.begin() + rows, expected.end()));
  options.seed = 2;
  EXPECT_NE(RowSampler(options).Get(0).tokens, expected[0]);
  std::vector<int64_t> wrong(3);
  {
    std::vector<std::jthread> threads;
    for (size_t t = 0; t < wrong.size(); ++t) {
      threads.emplace_back([&, t] {
        for (int64_t i = 0; i < 2 * rows; i += 7) {
          const int64_t at = (i + static_cast<int64_t>(t) * rows / 2) % (2 * rows);
          wrong[t] += again.Get(at).tokens != expected[static_cast<size_t>(at)];
        }
      });
    }
  }
  EXPECT_EQ(wrong, std::vector<int64_t>(3));
}

TEST_F(BalancedRowsTest, ShortEpochsAndLongDocuments) {
  // One document of many rows: nothing to balance, and nothing lost.
  Ids ids(1000);
  std::iota(ids.begin(), ids.end(), 0);
  WriteDataset(temp_ / "mix", {ids});
  for (const int64_t length : {1, 7, 90, 999}) {
    const RowSampler sampler(Options(length, true));
    const EpochTokens seen = CheckEpoch(sampler, 3, length, 1, {ids});
    EXPECT_EQ(seen.count, 999 / length * length);
  }
  const Documents few = {{0}, {1, 2, 3}, {4, 5, 6, 7, 8}, {9}};
  WriteDataset(temp_ / "mix", few);
  for (int64_t epoch = 0; epoch < 30; ++epoch) {
    CheckEpoch(RowSampler(Options(3, true)), epoch, 3, 1, few);
  }
}

TEST_F(BalancedRowsTest, WhatCannotBeBalancedIsRefused) {
  WriteMix(16, 400, 1);
  RowSamplerOptions options = Options(16, true);
  EXPECT_NO_THROW(RowSampler{options});
  options.document_mask = false;
  ExpectContains(MessageOf<InvalidArgument>([&] { RowSampler sampler(options); }),
                 "data.packing: BALANCED needs");
  options.document_mask = true;
  options.shuffle = false;
  EXPECT_THROW(RowSampler{options}, InvalidArgument);
}

// Largest over mean work of the replicas of each step: its mean and maximum over the steps.
struct Imbalance {
  double mean = 0, worst = 0;
};
Imbalance MeasureSteps(const RowSampler& sampler, int64_t rows_per_step, int64_t dp, bool deal) {
  Imbalance result;
  const int64_t steps = sampler.RowsAvailable() / rows_per_step;
  for (int64_t s = 0; s < steps; ++s) {
    std::vector<int64_t> areas, order(static_cast<size_t>(rows_per_step));
    for (int64_t i = 0; i < rows_per_step; ++i) {
      areas.push_back(CountedArea(sampler.Get(s * rows_per_step + i)));
    }
    std::iota(order.begin(), order.end(), 0);
    if (deal) order = data::DealRows(areas, dp, 1);
    std::vector<double> work(static_cast<size_t>(dp));
    for (size_t i = 0; i < order.size(); ++i) {
      work[i % work.size()] += static_cast<double>(areas[static_cast<size_t>(order[i])]);
    }
    const double ratio = *std::max_element(work.begin(), work.end()) * static_cast<double>(dp) /
                         std::accumulate(work.begin(), work.end(), 0.0);
    result.mean += ratio / static_cast<double>(steps);
    result.worst = std::max(result.worst, ratio);
  }
  return result;
}

TEST_F(BalancedRowsTest, ReplicasHaveEvenWorkOnAMixOfLengths) {
  constexpr int64_t kLength = 1024;
  WriteMix(kLength, kLength * 1030, 11);
  const RowSampler greedy(Options(kLength, false)), even(Options(kLength, true));
  std::printf("rows a step  dp  greedy mean (worst)  only packed  packed and dealt\n");
  for (const auto& [rows, dp] : std::vector<std::pair<int64_t, int64_t>>{
           {2, 2}, {8, 2}, {8, 8}, {32, 4}, {32, 8}, {64, 16}}) {
    const Imbalance before = MeasureSteps(greedy, rows, dp, false),
                    packed = MeasureSteps(even, rows, dp, false),
                    after = MeasureSteps(even, rows, dp, true);
    std::printf("%11lld %3lld  %.3f (%.3f)  %.3f (%.3f)  %.3f (%.3f)\n",
                static_cast<long long>(rows), static_cast<long long>(dp), before.mean, before.worst,
                packed.mean, packed.worst, after.mean, after.worst);
    EXPECT_LT(after.mean, dp <= 8 ? 1.03 : 1.1) << rows << " rows on " << dp;
    EXPECT_LT(after.mean - 1, 0.2 * (before.mean - 1)) << rows << " rows on " << dp;
  }
}

}  // namespace
}  // namespace longspan::test
