#include "parallel/context/placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <set>

#include "ops/core/error.h"
#include "ops/core/rng.h"

namespace longspan::test {
namespace {

using namespace parallel;

constexpr PlacementKind kFixedKinds[] = {PlacementKind::kContiguous, PlacementKind::kZigzag,
                                         PlacementKind::kStriped};

// Every token once; what the accessors say about a rank agrees; ranks differ by at most two blocks
// a row (zigzag deals two parts) or one.
void ExpectConsistent(const Placement& p) {
  const int64_t length = p.row_length(), per_row = ops::BlocksPerRow(length);
  std::vector<int64_t> index(static_cast<size_t>(p.tokens()));
  std::iota(index.begin(), index.end(), 0);
  std::vector<int> seen(index.size());
  for (int64_t rank = 0; rank < p.ranks(); ++rank) {
    const std::vector<int64_t> mine = p.Slice(index, rank);
    ASSERT_EQ(static_cast<int64_t>(mine.size()), p.local_tokens(rank));
    std::vector<int64_t> by_parts, by_blocks;
    for (int64_t row = 0; row < p.rows(); ++row) {
      int64_t held = 0;
      for (const TokenRange& part : p.parts(row, rank)) {
        EXPECT_EQ(part.begin % ops::kMaskBlock, 0);
        EXPECT_TRUE(part.end % ops::kMaskBlock == 0 || part.end == length);
        for (int64_t t = part.begin; t < part.end; ++t) by_parts.push_back(row * length + t);
        held += (part.end - part.begin + ops::kMaskBlock - 1) / ops::kMaskBlock;
      }
      const int64_t least = per_row / p.ranks();
      EXPECT_GE(held, least) << "row " << row << " rank " << rank;
      EXPECT_LE(held, least + (per_row % p.ranks() != 0)) << "row " << row << " rank " << rank;
    }
    const ops::BlockList& list = p.blocks(rank);
    for (size_t i = 0; i < list.ids.size(); ++i) {
      EXPECT_EQ(p.owner(list.ids[i]), rank);
      const int64_t first = ops::BlockFirstToken(length, list.ids[i]);
      EXPECT_EQ(list.token_begin[i], static_cast<int64_t>(by_blocks.size()));
      for (int64_t t = 0; t < ops::BlockTokens(length, list.ids[i]); ++t) {
        by_blocks.push_back(first + t);
      }
    }
    EXPECT_EQ(mine, by_parts);
    EXPECT_EQ(mine, by_blocks);
    EXPECT_TRUE(std::is_sorted(mine.begin(), mine.end()));
    for (const int64_t t : mine) ++seen[static_cast<size_t>(t)];
  }
  EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), p.tokens()) << "every token once";
}

TEST(PlacementTest, ZigzagPairsEarlyAndLateParts) {
  const Placement p(PlacementKind::kZigzag, 2, 512, 2);
  for (const int64_t row : {0, 1}) {
    EXPECT_EQ(p.parts(row, 0), (std::vector<TokenRange>{{0, 128}, {384, 512}}));
    EXPECT_EQ(p.parts(row, 1), (std::vector<TokenRange>{{128, 384}}));
  }
  EXPECT_EQ(p.blocks(0).ids, (std::vector<int32_t>{0, 1, 6, 7, 8, 9, 14, 15}));
}

TEST(PlacementTest, StripedDealsBlocksInTurn) {
  const Placement p(PlacementKind::kStriped, 2, 64 * 5 - 1, 2);
  EXPECT_EQ(p.blocks(0).ids, (std::vector<int32_t>{0, 2, 4, 5, 7, 9}));
  EXPECT_EQ(p.blocks(1).ids, (std::vector<int32_t>{1, 3, 6, 8}));
  EXPECT_EQ(p.parts(1, 0), (std::vector<TokenRange>{{0, 64}, {128, 192}, {256, 319}}));
  EXPECT_EQ(p.local_tokens(0), 2 * (5 * 64 - 1) - 4 * 64);
}

TEST(PlacementTest, FirstPartsHaveOneBlockMore) {
  const Placement contiguous(PlacementKind::kContiguous, 1, 7 * 64, 3);
  EXPECT_EQ(contiguous.owners(), (std::vector<int32_t>{0, 0, 0, 1, 1, 2, 2}));
  const Placement zigzag(PlacementKind::kZigzag, 1, 11 * 64, 3);  // parts of 2 2 2 2 2 1
  EXPECT_EQ(zigzag.owners(), (std::vector<int32_t>{0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0}));
}

TEST(PlacementTest, EveryTokenHasOneOwner) {
  for (const PlacementKind kind : kFixedKinds) {
    for (const int64_t ranks : {1, 2, 3, 4, 7, 8, 40}) {
      for (const int64_t length : {1, 63, 64, 65, 500, 1024, 64 * 31 + 7}) {
        SCOPED_TRACE(Str(ToString(kind), " ", length, " on ", ranks));
        ExpectConsistent(Placement(kind, 3, length, ranks));
      }
    }
  }
}

TEST(PlacementTest, RanksMayHoldNothing) {
  for (const PlacementKind kind : kFixedKinds) {
    const Placement p(kind, 2, 130, 5);  // three blocks a row
    int64_t empty = 0;
    for (int64_t rank = 0; rank < 5; ++rank) {
      empty += p.local_tokens(rank) == 0;
      EXPECT_EQ(p.blocks(rank).token_begin.front(), 0);
    }
    EXPECT_EQ(empty, 2) << ToString(kind);
    EXPECT_THROW(p.local_tokens(), InvalidArgument) << ToString(kind);
  }
  EXPECT_EQ(Placement(PlacementKind::kZigzag, 2, 512, 2).local_tokens(), 512);
}

TEST(PlacementTest, OwnersMakeAnyPlacement) {
  const std::vector<int32_t> owners = {2, 0, 0, 2, 1, 0, 0, 0};
  const Placement p = Placement::FromOwners(2, 64 * 3 + 5, 3, owners);
  EXPECT_EQ(p.kind(), PlacementKind::kBalanced);
  EXPECT_EQ(p.owners(), owners);
  EXPECT_EQ(p.blocks(2).ids, (std::vector<int32_t>{0, 3}));
  EXPECT_EQ(p.parts(0, 2), (std::vector<TokenRange>{{0, 64}, {192, 197}}));
  EXPECT_EQ(p.parts(1, 0), (std::vector<TokenRange>{{64, 197}}));
  EXPECT_TRUE(p.parts(1, 2).empty());
  EXPECT_THROW(Placement::FromOwners(2, 64 * 3 + 5, 2, owners), InvalidArgument);
  EXPECT_THROW(Placement::FromOwners(1, 64 * 3 + 5, 3, owners), InvalidArgument);
}

TEST(PlacementTest, GroupsHoldTheStorageOfTheirRanks) {
  for (const PlacementKind kind : kFixedKinds) {
    const Placement p(kind, 2, 64 * 13 + 9, 6), grouped = p.Grouped(3);
    ASSERT_EQ(grouped.ranks(), 2);
    std::vector<int64_t> index(static_cast<size_t>(p.tokens()));
    std::iota(index.begin(), index.end(), 0);
    for (int64_t group = 0; group < 2; ++group) {
      std::vector<int64_t> want;
      for (int64_t rank = 3 * group; rank < 3 * group + 3; ++rank) {
        const auto part = p.Slice(index, rank);
        want.insert(want.end(), part.begin(), part.end());
        for (const int32_t block : p.blocks(rank).ids) EXPECT_EQ(grouped.owner(block), group);
      }
      EXPECT_EQ(grouped.Slice(index, group), want) << ToString(kind);
    }
    EXPECT_EQ(p.Grouped(1), p);
    EXPECT_THROW(p.Grouped(4), InvalidArgument);
  }
}

TEST(PlacementTest, HashTellsPlacementsApart) {
  std::vector<Placement> all;
  for (const PlacementKind kind : kFixedKinds) {
    for (const int64_t ranks : {2, 3, 4}) all.emplace_back(kind, 1, 64 * 48, ranks);
  }
  all.emplace_back(PlacementKind::kZigzag, 2, 64 * 24, 2);
  all.emplace_back(PlacementKind::kZigzag, 1, 64 * 48 - 1, 2);
  all.push_back(all.front().Grouped(2));
  std::set<uint64_t> hashes;
  for (const Placement& p : all) hashes.insert(p.Hash());
  EXPECT_EQ(hashes.size(), all.size());
  const Placement striped(PlacementKind::kStriped, 1, 64 * 48, 3);
  const Placement same = Placement::FromOwners(1, 64 * 48, 3, striped.owners());
  EXPECT_EQ(same, striped);
  EXPECT_EQ(same.Hash(), striped.Hash());
}

TEST(PlacementTest, ProblemNamesUsableLengths) {
  const std::string text = Placement::Problem(PlacementKind::kZigzag, 1000, 2);
  EXPECT_NE(text.find("768"), std::string::npos) << text;
  EXPECT_NE(text.find("1024"), std::string::npos) << text;
  EXPECT_EQ(Placement::Problem(PlacementKind::kContiguous, 1000, 1), "");
  for (const PlacementKind kind :
       {PlacementKind::kContiguous, PlacementKind::kStriped, PlacementKind::kBalanced}) {
    EXPECT_EQ(Placement::Problem(kind, 64 * 6, 3), "") << ToString(kind);
    EXPECT_NE(Placement::Problem(kind, 64 * 7, 3), "") << ToString(kind);
  }
}

TEST(PlacementTest, SizesThatMakeNoSense) {
  EXPECT_THROW(Placement(PlacementKind::kZigzag, 1, 0, 2), InvalidArgument);
  EXPECT_THROW(Placement(PlacementKind::kZigzag, 1, 64, 0), InvalidArgument);
  EXPECT_THROW(Placement(PlacementKind::kZigzag, -1, 64, 2), InvalidArgument);
  EXPECT_THROW(Placement(PlacementKind::kZigzag, int64_t{1} << 20, 4096, 2), InvalidArgument);
  EXPECT_THROW(Placement(PlacementKind::kBalanced, 1, 1024, 2), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
