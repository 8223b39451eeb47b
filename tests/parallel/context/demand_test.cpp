// Who needs which keys, against a count of token by token that knows neither masks nor plans.
#include "parallel/context/demand.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <set>
#include <thread>

#include "ops/core/error.h"
#include "ops/core/rng.h"
#include "tests/ops/attention/mask_cases.h"
#include "tests/ops/attention/reference.h"

namespace longspan::test {
namespace {

using namespace parallel;
using ops::AttentionPattern;
using ops::Documents;

constexpr int64_t kKvHeads = 4;

// Visible pairs between blocks: pairs[head][query block][key block].
struct BlockPairs {
  int64_t blocks;
  std::vector<int64_t> pairs;
  int64_t Of(int64_t head, int64_t query, int64_t key) const {
    return pairs[static_cast<size_t>((head * blocks + query) * blocks + key)];
  }
};

BlockPairs CountPairs(const AttentionPattern& pattern, const Documents& d) {
  const int64_t per_row = ops::BlocksPerRow(d.row_length), blocks = d.rows * per_row;
  BlockPairs count{blocks, std::vector<int64_t>(static_cast<size_t>(kKvHeads * blocks * blocks))};
  const auto block = [&](int64_t t) {
    return t / d.row_length * per_row + t % d.row_length / ops::kMaskBlock;
  };
  for (int64_t h = 0; h < kKvHeads; ++h) {
    for (int64_t q = 0; q < d.tokens(); ++q) {
      for (int64_t k = d.doc_begin[static_cast<size_t>(q)]; k < d.doc_end[static_cast<size_t>(q)];
           ++k) {
        count.pairs[static_cast<size_t>((h * blocks + block(q)) * blocks + block(k))] +=
            Sees(pattern, kKvHeads, d, h, q, k);
      }
    }
  }
  return count;
}

std::vector<Placement> PlacementsOf(const Documents& d, int64_t ranks, uint64_t seed) {
  std::vector<Placement> all;
  for (const PlacementKind kind :
       {PlacementKind::kContiguous, PlacementKind::kZigzag, PlacementKind::kStriped}) {
    all.emplace_back(kind, d.rows, d.row_length, ranks);
  }
  const Philox rng(seed, StreamOf("demand owners"));
  std::vector<int32_t> owner(all.front().owners().size());
  for (size_t b = 0; b < owner.size(); ++b) {
    owner[b] = static_cast<int32_t>(rng.Below(b, static_cast<uint64_t>(ranks)));
  }
  all.push_back(Placement::FromOwners(d.rows, d.row_length, ranks, owner));
  if (ranks % 2 == 0)
    all.push_back(Placement(PlacementKind::kZigzag, d.rows, d.row_length, 2 * ranks).Grouped(2));
  return all;
}

// Tokens of blocks [0, blocks) that fulfil `wanted`.
template <class Wanted>
int64_t Tokens(const Documents& d, int64_t blocks, const Wanted& wanted) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (wanted(b)) tokens += ops::BlockTokens(d.row_length, static_cast<int32_t>(b));
  }
  return tokens;
}

void ExpectDemand(const AttentionPattern& pattern,
                  const std::shared_ptr<const Documents>& documents, const BlockPairs& count,
                  const Placement& placement) {
  const Documents& d = *documents;
  const auto demand = ContextDemand::Build(pattern, kKvHeads, documents,
                                           std::make_shared<const Placement>(placement));
  const auto ranks = static_cast<int>(placement.ranks());
  ASSERT_EQ(demand->blocks(), count.blocks);
  // needs[h][rank][block]
  const auto needs = [&](int64_t h, int rank, int64_t key) {
    for (const int32_t query : placement.blocks(rank).ids) {
      if (count.Of(h, query, key) > 0) return true;
    }
    return false;
  };
  const auto remote_rows = [&](int begin, int end) {
    int64_t rows = 0;
    for (int64_t h = 0; h < kKvHeads; ++h) {
      rows += Tokens(d, count.blocks, [&](int64_t b) {
        if (placement.owner(b) >= begin && placement.owner(b) < end) return false;
        for (int rank = begin; rank < end; ++rank) {
          if (needs(h, rank, b)) return true;
        }
        return false;
      });
    }
    return rows;
  };
  for (int rank = 0; rank < ranks; ++rank) {
    int64_t total = 0;
    for (int64_t h = 0; h < kKvHeads; ++h) {
      const int32_t p = demand->pattern_of(h);
      int64_t pairs = 0;
      for (int owner = 0; owner < ranks; ++owner) {
        std::vector<int32_t> wanted;
        int64_t between = 0;
        for (int64_t b = 0; b < count.blocks; ++b) {
          if (placement.owner(b) != owner) continue;
          EXPECT_EQ(demand->Needs(rank, p, b), needs(h, rank, b))
              << "rank " << rank << " block " << b;
          if (needs(h, rank, b)) wanted.push_back(static_cast<int32_t>(b));
          for (const int32_t q : placement.blocks(rank).ids) between += count.Of(h, q, b);
        }
        EXPECT_EQ(demand->NeededFrom(rank, owner, p), wanted) << rank << " from " << owner;
        EXPECT_EQ(demand->PairsBetween(p, rank, owner), between) << rank << " from " << owner;
        pairs += between;
      }
      EXPECT_EQ(demand->Pairs(p, rank), pairs) << "rank " << rank;
      total += pairs;
    }
    EXPECT_EQ(demand->TotalPairs(rank), total) << "rank " << rank;
    EXPECT_EQ(demand->LowerBoundRows(rank), remote_rows(rank, rank + 1)) << "rank " << rank;
  }
  for (const int width : {1, 2, 3}) {
    for (int node = 0; node * width < ranks; ++node) {
      EXPECT_EQ(demand->NodeLowerBoundRows(node, width),
                remote_rows(node * width, std::min(ranks, (node + 1) * width)))
          << "node " << node << " of " << width;
    }
  }
}

TEST(ContextDemandTest, EqualsTheCountTokenByToken) {
  const auto seed = static_cast<uint64_t>(testing::UnitTest::GetInstance()->random_seed());
  std::printf("--gtest_random_seed=%d\n", static_cast<int>(seed));
  const std::vector<NamedPattern> patterns = Patterns();
  const Philox rng(seed, StreamOf("demand cases"));
  int cases = 0;
  for (const NamedDocuments& documents : DocumentSets()) {
    if (documents.documents->tokens() > 1200) continue;
    // A few patterns with each, drawn anew in every run; every kind comes within a few runs.
    for (int n = 0; n < 6; ++n) {
      const NamedPattern& pattern =
          patterns[rng.Below(static_cast<uint64_t>(cases), patterns.size())];
      const BlockPairs count = CountPairs(pattern.pattern, *documents.documents);
      for (const int64_t ranks : {1 + cases % 3, 4 + cases % 5}) {
        const std::vector<Placement> placements =
            PlacementsOf(*documents.documents, ranks, seed + static_cast<uint64_t>(cases));
        for (size_t p = 0; p < placements.size(); ++p) {
          SCOPED_TRACE(Str(pattern.name, " | ", documents.name, " | ",
                           ToString(placements[p].kind()), " ", p, " on ", ranks, ", seed ", seed));
          ExpectDemand(pattern.pattern, documents.documents, count, placements[p]);
          if (testing::Test::HasFailure()) return;  // one case tells enough
        }
      }
      ++cases;
    }
  }
  EXPECT_GT(cases, 50);
}

// Long runs are added 64 blocks at a time: rows longer than those above, of every step and phase.
TEST(ContextDemandTest, LongRowsEqualTheMask) {
  constexpr int64_t kTokens = 64 * 700 - 9;
  const auto documents = std::make_shared<const Documents>(
      Documents::FromEnds(kTokens, {{64 * 37 + 5, 64 * 300, kTokens}}));
  std::vector<AttentionPattern> patterns = {AttentionPattern::Causal(), AttentionPattern::Full(),
                                            AttentionPattern::Window(64 * 150 + 7, 3),
                                            AttentionPattern::BlockCausal(128)};
  for (const int64_t stride : {2, 3, 7, 31, 32, 33, 64, 100}) {
    for (const int64_t block : {32, 64, 128}) {
      patterns.push_back(AttentionPattern::S2({.block_size = block,
                                               .local_blocks = 2,
                                               .stride_blocks = stride,
                                               .allow_incomplete_coverage = true}));
    }
  }
  for (const AttentionPattern& pattern : patterns) {
    SCOPED_TRACE(pattern.ToString());
    const Placement placement(PlacementKind::kZigzag, 1, kTokens, 3);
    const auto demand =
        ContextDemand::Build(pattern, 3, documents, std::make_shared<const Placement>(placement));
    for (int rank = 0; rank < 3; ++rank) {
      const auto mask = ops::BlockMask::Build(pattern, 3, documents, placement.blocks(rank),
                                              ops::BlockList::All(*documents));
      for (int64_t h = 0; h < 3; ++h) {
        const int32_t p = demand->pattern_of(h);
        std::vector<int32_t> needed;
        int64_t pairs = 0;
        for (int owner = 0; owner < 3; ++owner) {
          const auto from = demand->NeededFrom(rank, owner, p);
          needed.insert(needed.end(), from.begin(), from.end());
          pairs += demand->PairsBetween(p, rank, owner);
        }
        std::sort(needed.begin(), needed.end());
        EXPECT_EQ(needed, mask->NeededKeys(h)) << "rank " << rank << " head " << h;
        EXPECT_EQ(demand->Pairs(p, rank), mask->VisiblePairs(h));
        EXPECT_EQ(pairs, mask->VisiblePairs(h));
      }
    }
  }
}

std::vector<int64_t> LowerBounds(const AttentionPattern& pattern, int64_t kv_heads, int64_t tokens,
                                 const std::vector<int64_t>& ends, PlacementKind kind,
                                 int64_t ranks) {
  const auto documents = std::make_shared<const Documents>(Documents::FromEnds(tokens, {ends}));
  const auto demand = ContextDemand::Build(
      pattern, kv_heads, documents, std::make_shared<const Placement>(kind, 1, tokens, ranks));
  std::vector<int64_t> rows;
  for (int rank = 0; rank < ranks; ++rank) rows.push_back(demand->LowerBoundRows(rank));
  return rows;
}

// Per-head strides of 8 with one offset each leave a ninth of what a dense ring moves.
TEST(ContextDemandTest, StridedHeadsNeedANinthOfTheDenseRing) {
  constexpr int64_t kTokens = 131072, kHeads = 8, kRanks = 8;
  const auto s2 = AttentionPattern::S2({.block_size = 64, .local_blocks = 16, .stride_blocks = 8});
  const std::vector<int64_t> rows =
      LowerBounds(s2, kHeads, kTokens, {kTokens}, PlacementKind::kZigzag, kRanks);
  const auto ring_of_a_rank = static_cast<double>((kRanks - 1) * kTokens / kRanks * kHeads);
  double total = 0, worst = 0;
  for (const int64_t r : rows) {
    total += static_cast<double>(r) / ring_of_a_rank / kRanks;
    worst = std::max(worst, static_cast<double>(r) / ring_of_a_rank);
  }
  std::printf(
      "S2 on 8 ranks, zigzag, 131072 tokens: %.2f %% of the dense ring, worst rank %.2f %%\n",
      100 * total, 100 * worst);
  EXPECT_LE(total, 0.11);
  EXPECT_LE(worst, 0.135);
  EXPECT_GT(total, 0.08);
}

// A window of 4096 needs the 64 blocks before a part, whatever the length and the number of ranks.
TEST(ContextDemandTest, WindowsNeedAHalo) {
  for (const int64_t tokens : {131072, 262144}) {
    for (const int64_t ranks : {4, 8, 16}) {
      const auto rows = LowerBounds(AttentionPattern::Window(4096), 2, tokens, {tokens},
                                    PlacementKind::kContiguous, ranks);
      for (size_t r = 0; r < rows.size(); ++r) EXPECT_EQ(rows[r], r == 0 ? 0 : 2 * 4096) << r;
    }
  }
}

TEST(ContextDemandTest, DocumentsInsideARankNeedNothing) {
  constexpr int64_t kTokens = 64 * 40;
  for (const auto& pattern : {AttentionPattern::Full(), AttentionPattern::Causal()}) {
    const std::vector<int64_t> inside = {100, 640, 1000, 1280, 1920, 2000, kTokens};
    EXPECT_EQ(LowerBounds(pattern, 2, kTokens, inside, PlacementKind::kContiguous, 4),
              (std::vector<int64_t>{0, 0, 0, 0}));
  }
  // One document over an edge: the later rank needs its two blocks before the edge, and of a full
  // mask the earlier one those behind.
  const std::vector<int64_t> over = {550, 700, 1280, 1920, kTokens};
  EXPECT_EQ(
      LowerBounds(AttentionPattern::Causal(), 2, kTokens, over, PlacementKind::kContiguous, 4),
      (std::vector<int64_t>{0, 2 * 128, 0, 0}));
  EXPECT_EQ(LowerBounds(AttentionPattern::Full(), 2, kTokens, over, PlacementKind::kContiguous, 4),
            (std::vector<int64_t>{2 * 64, 2 * 128, 0, 0}));
}

// Heads in any order and repeated: what a rank that works on some heads plans with.
TEST(ContextDemandTest, SelectedHeadsNeedWhatTheyNeedTogether) {
  const auto documents =
      std::make_shared<const Documents>(Documents::FromEnds(900, {{130, 900}, {900}}));
  const auto placement = std::make_shared<const Placement>(PlacementKind::kZigzag, 2, 900, 3);
  const std::vector<int32_t> first = {3, 1, 2, 3}, second = {2, 0, 0}, both = {2, 3, 3};
  for (const auto& pattern :
       {AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 4}),
        AttentionPattern::Spans({{50, 3}, {}, {7, 0}, {120, 70}}), AttentionPattern::Causal()}) {
    SCOPED_TRACE(pattern.ToString());
    const auto all = ContextDemand::Build(pattern, kKvHeads, documents, placement);
    const auto expect = [&](const ContextDemand& some, const std::vector<int32_t>& heads) {
      ASSERT_EQ(some.kv_heads(), static_cast<int64_t>(heads.size()));
      std::vector<int64_t> heads_of(static_cast<size_t>(some.patterns()));
      for (int rank = 0; rank < 3; ++rank) {
        int64_t pairs = 0, rows = 0;
        for (size_t i = 0; i < heads.size(); ++i) {
          const int32_t p = some.pattern_of(static_cast<int64_t>(i)), q = all->pattern_of(heads[i]);
          heads_of[static_cast<size_t>(p)] += rank == 0;
          EXPECT_EQ(some.Pairs(p, rank), all->Pairs(q, rank));
          pairs += all->Pairs(q, rank);
          for (int owner = 0; owner < 3; ++owner) {
            EXPECT_EQ(some.PairsBetween(p, rank, owner), all->PairsBetween(q, rank, owner));
            EXPECT_EQ(some.NeededFrom(rank, owner, p), all->NeededFrom(rank, owner, q));
            if (owner == rank) continue;
            for (const int32_t b : all->NeededFrom(rank, owner, q)) {
              rows += ops::BlockTokens(900, b);
            }
          }
        }
        EXPECT_EQ(some.TotalPairs(rank), pairs);
        EXPECT_EQ(some.LowerBoundRows(rank), rows);
        EXPECT_EQ(some.NodeLowerBoundRows(rank, 1), rows);
        const auto mask = some.Mask(placement->blocks(rank), ops::BlockList::All(*documents));
        EXPECT_EQ(mask->TotalVisiblePairs(), pairs);
      }
      for (int64_t p = 0; p < some.patterns(); ++p) {
        EXPECT_EQ(some.heads_of(p), heads_of[static_cast<size_t>(p)]);
      }
    };
    const auto chosen = all->SelectHeads(first);
    expect(*chosen, first);
    expect(*chosen->SelectHeads(second), both);
    EXPECT_NE(chosen->Hash(), all->Hash());
    EXPECT_NE(chosen->Hash(), all->SelectHeads(second)->Hash());
    const std::vector<int32_t> missing = {4};
    EXPECT_THROW(all->SelectHeads(missing), InvalidArgument);
  }
}

TEST(ContextDemandTest, HashTellsProblemsApart) {
  const auto hash = [](const AttentionPattern& pattern, int64_t heads,
                       const std::vector<std::vector<int64_t>>& ends, PlacementKind kind) {
    const auto documents = std::make_shared<const Documents>(Documents::FromEnds(512, ends));
    return ContextDemand::Build(
               pattern, heads, documents,
               std::make_shared<const Placement>(kind, static_cast<int64_t>(ends.size()), 512, 2))
        ->Hash();
  };
  const auto zigzag = PlacementKind::kZigzag;
  const auto causal = AttentionPattern::Causal();
  const std::set<uint64_t> hashes = {
      hash(causal, 2, {{512}}, zigzag),
      hash(causal, 3, {{512}}, zigzag),
      hash(AttentionPattern::Full(), 2, {{512}}, zigzag),
      hash(AttentionPattern::Window(7), 2, {{512}}, zigzag),
      hash(AttentionPattern::Window(8), 2, {{512}}, zigzag),
      hash(causal, 2, {{100, 512}}, zigzag),
      hash(causal, 2, {{101, 512}}, zigzag),
      hash(causal, 2, {{512}, {512}}, zigzag),
      hash(causal, 2, {{512}}, PlacementKind::kContiguous),
  };
  EXPECT_EQ(hashes.size(), 9u);
  EXPECT_TRUE(hashes.contains(hash(causal, 2, {{512}}, zigzag)));
}

TEST(ContextDemandTest, PairsMayBeAskedFromSeveralThreads) {
  const auto documents = std::make_shared<const Documents>(Documents::OnePerRow(1, 64 * 64));
  const auto demand = ContextDemand::Build(
      AttentionPattern::Causal(), 1, documents,
      std::make_shared<const Placement>(PlacementKind::kStriped, 1, 64 * 64, 8));
  std::vector<std::vector<int64_t>> found(4);
  std::vector<std::thread> threads;
  for (auto& pairs : found) {
    threads.emplace_back([&] {
      for (int rank = 0; rank < 8; ++rank) {
        for (int owner = 0; owner < 8; ++owner) {
          pairs.push_back(demand->PairsBetween(0, rank, owner));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& pairs : found) EXPECT_EQ(pairs, found.front());
}

TEST(ContextDemandTest, RefusesWhatDoesNotFit) {
  const auto documents = std::make_shared<const Documents>(Documents::OnePerRow(1, 512));
  const auto other = std::make_shared<const Placement>(PlacementKind::kZigzag, 1, 576, 2);
  const auto fits = std::make_shared<const Placement>(PlacementKind::kZigzag, 1, 512, 2);
  EXPECT_THROW(ContextDemand::Build(AttentionPattern::Causal(), 2, documents, other),
               InvalidArgument);
  EXPECT_THROW(ContextDemand::Build(AttentionPattern::Window(0), 2, documents, fits),
               InvalidArgument);
  EXPECT_THROW(ContextDemand::Build(AttentionPattern::Causal(), 2, nullptr, fits), InvalidArgument);
}

// Planning of a million tokens on 1024 ranks takes well below a second for every pattern; the limit
// leaves room for slow machines and sanitizers.
TEST(ContextDemandTest, AMillionTokensOn1024Ranks) {
  constexpr int64_t kTokens = 1048576, kRanks = 1024;
  std::vector<int64_t> ends;
  const Philox rng(3, StreamOf("million"));
  for (int64_t at = 0; at < kTokens;) {
    at = std::min(kTokens, at + 500 + static_cast<int64_t>(rng.Below(ends.size(), 30000)));
    ends.push_back(at);
  }
  const std::vector<std::pair<AttentionPattern, bool>> cases = {
      {AttentionPattern::Causal(), false},
      {AttentionPattern::Causal(), true},
      {AttentionPattern::Window(4096, 64), false},
      {AttentionPattern::S2({.local_blocks = 16, .stride_blocks = 8}), false},
      {AttentionPattern::Power({64, 4, 1}), false},
      {AttentionPattern::GlobalWindow(4096, 4096, true), false}};
  for (const auto& [pattern, packed] : cases) {
    const auto documents = std::make_shared<const Documents>(
        packed ? Documents::FromEnds(kTokens, {ends}) : Documents::OnePerRow(1, kTokens));
    const auto placement =
        std::make_shared<const Placement>(PlacementKind::kZigzag, 1, kTokens, kRanks);
    const auto start = std::chrono::steady_clock::now();
    const auto demand = ContextDemand::Build(pattern, 8, documents, placement);
    int64_t rows = 0;
    for (int rank = 0; rank < kRanks; ++rank) rows += demand->LowerBoundRows(rank);
    const std::chrono::duration<double, std::milli> spent =
        std::chrono::steady_clock::now() - start;
    std::printf("%-28s%s %8.1f ms, %.3f %% of the dense ring\n", pattern.ToString().c_str(),
                packed ? " documents" : "          ", spent.count(),
                100 * static_cast<double>(rows) / static_cast<double>(8 * kTokens * (kRanks - 1)));
    EXPECT_GT(rows, 0);
    EXPECT_LT(spent.count(), 10000);
  }
}

}  // namespace
}  // namespace longspan::test
