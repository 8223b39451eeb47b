// How the backward pass cuts a mask: every entry is in exactly one piece and one row, nothing lies
// outside the memory that is allocated, and no two entries share a tile.
#include "ops/attention/cpu/bf16_pieces.h"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <tuple>

#include "tests/ops/attention/mask_cases.h"

namespace longspan::test {
namespace {

using ops::cpu::MaskPart;
using ops::cpu::MaskParts;
using ops::cpu::MaskPiece;
using Entry = std::tuple<int64_t, int32_t, int32_t>;  // kv head, query block, key block

std::map<Entry, bool> EntriesOf(const ops::BlockMask& mask) {
  std::map<Entry, bool> entries;
  for (int64_t h = 0; h < mask.kv_heads(); ++h) {
    for (int64_t i = 0; i < mask.queries().size(); ++i) {
      for (const ops::BlockRun& run : mask.row_runs().Row(mask.pattern_of(h), i)) {
        for (int32_t n = 0; n < run.count; ++n) {
          entries[{h, mask.queries().ids[static_cast<size_t>(i)], run.block(n)}] =
              run.kind() == ops::BlockKind::kPartial;
        }
      }
    }
  }
  return entries;
}

// Parts of the mask, after checks.
int CheckParts(const ops::BlockMask& mask, int64_t group) {
  const std::map<Entry, bool> want = EntriesOf(mask);
  std::map<Entry, bool> seen;
  MaskParts parts(mask, group);
  int count = 0;
  for (MaskPart part; parts.Next(part); ++count) {
    std::map<Entry, int64_t> tiles;
    std::set<int64_t> taken, shared, pieces;
    std::map<std::pair<int32_t, int32_t>, int> pieces_of_column;
    for (int64_t i = 0; i < part.piece_count(); ++i) {
      const MaskPiece& piece = part.PieceBySize(i);
      EXPECT_TRUE(pieces.insert(piece.begin).second);
      ++pieces_of_column[{piece.kv_head, piece.column}];
      if (piece.shared >= 0) {
        EXPECT_TRUE(shared.insert(piece.shared).second);
        EXPECT_LT(piece.shared, parts.most_shared());
      }
      EXPECT_LE((piece.end - piece.begin - 1) * group, MaskParts::kTilesOfPiece);
      for (const ops::cpu::PieceEntry& entry : part.EntriesOf(piece)) {
        const Entry key{piece.kv_head, entry.query,
                        mask.keys().ids[static_cast<size_t>(piece.column)]};
        EXPECT_TRUE(seen.emplace(key, entry.partial).second) << "twice";
        tiles[key] = part.TileOf(piece, entry);
        for (int64_t g = 0; g < group; ++g) {
          EXPECT_TRUE(taken.insert(tiles[key] + g).second) << "two entries share a tile";
          EXPECT_LT(tiles[key] + g, parts.most_tiles());
        }
      }
    }
    size_t shared_pieces = 0;
    for (int64_t i = 0; i < part.shared_column_count(); ++i) {
      const auto column = part.SharedColumn(i);
      shared_pieces += column.size();
      for (const MaskPiece& piece : column) {
        EXPECT_EQ(piece.column, column.front().column);
        EXPECT_EQ(piece.kv_head, column.front().kv_head);
      }
    }
    EXPECT_EQ(shared_pieces, shared.size());
    for (const auto& [column, n] : pieces_of_column) {
      EXPECT_TRUE(n == 1 || shared_pieces >= static_cast<size_t>(n));
    }
    size_t of_rows = 0;
    for (int64_t i = 0; i < part.row_count(); ++i) {
      const int64_t row = part.RowBySize(i);
      const int64_t h = row / mask.queries().size();
      const int32_t query = mask.queries().ids[static_cast<size_t>(row % mask.queries().size())];
      EXPECT_FALSE(part.TilesOfRow(row).empty());
      of_rows += part.TilesOfRow(row).size();
      for (const ops::cpu::RowTile& tile : part.TilesOfRow(row)) {
        const Entry key{h, query, mask.keys().ids[static_cast<size_t>(tile.column)]};
        const auto found = tiles.find(key);
        if (found == tiles.end()) {
          ADD_FAILURE() << "a row has an entry that no piece has";
        } else {
          EXPECT_EQ(tile.tile, found->second);
        }
      }
    }
    EXPECT_EQ(of_rows, tiles.size());
    if (testing::Test::HasFailure()) return count;
  }
  EXPECT_EQ(seen, want);
  return count;
}

TEST(Bf16PiecesTest, EveryEntryOnce) {
  for (const MaskCase& c : SampleMaskCases(60, 3)) {
    SCOPED_TRACE(c.Name());
    const auto mask = ops::BlockMask::Build(c.pattern.pattern, c.kv_heads, c.documents.documents,
                                            c.shard.queries, c.shard.keys);
    for (const int64_t group : {1, 3, 300}) CheckParts(*mask, group);
    if (HasFailure()) return;
  }
}

TEST(Bf16PiecesTest, LongMasksComeInSeveralParts) {
  const auto documents = std::make_shared<ops::Documents>(ops::Documents::OnePerRow(1, 6000));
  const auto all = ops::BlockList::All(*documents);
  const auto mask = ops::BlockMask::Build(ops::AttentionPattern::Causal(), 3, documents, all, all);
  // 94 blocks: 4465 entries a kv head, of which a part takes 512.
  EXPECT_EQ(CheckParts(*mask, 16), 27);
  EXPECT_EQ(CheckParts(*mask, 1), 2);
}

}  // namespace
}  // namespace longspan::test
