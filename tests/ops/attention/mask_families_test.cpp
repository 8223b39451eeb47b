// The 14 mask families of LongCA-bench (arXiv 2510.17896): each as a pattern with documents,
// against the slices of tokens that the benchmark describes it by.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <numeric>

#include "ops/attention/block_mask.h"
#include "ops/attention/token_sets.h"
#include "ops/core/error.h"
#include "tests/ops/attention/random_draws.h"

namespace longspan::test {
namespace {

using ops::AttentionPattern;
using ops::Documents;

// Queries [q0, q1) against keys [k0, k1): all pairs; those up to the diagonal that ends in the last
// query and key (causal); those from the diagonal that begins in the first ones on (inverse); both.
enum class SliceType { kFull, kCausal, kInverse, kBoth };
struct Slice {
  int64_t q0, q1, k0, k1;
  SliceType type = SliceType::kFull;
};

class Oracle {
 public:
  explicit Oracle(int64_t tokens) : tokens_(tokens), seen_(static_cast<size_t>(tokens * tokens)) {}
  void Add(const Slice& s) {
    const bool causal = s.type == SliceType::kCausal || s.type == SliceType::kBoth;
    const bool inverse = s.type == SliceType::kInverse || s.type == SliceType::kBoth;
    for (int64_t q = s.q0; q < s.q1; ++q) {
      for (int64_t k = s.k0; k < s.k1; ++k) {
        if (causal && s.k1 - k < s.q1 - q) continue;
        if (inverse && k - s.k0 < q - s.q0) continue;
        ASSERT_FALSE(seen_[Index(q, k)]) << "slices overlap at " << q << " " << k;
        seen_[Index(q, k)] = true;
      }
    }
  }
  // |q - k| <= reach among tokens [begin, end).
  void AddBand(int64_t begin, int64_t end, int64_t reach) {
    Add({begin, begin + reach, begin, begin + 2 * reach, SliceType::kCausal});
    Add({begin + reach, end - reach, begin, end, SliceType::kBoth});
    Add({end - reach, end, end - 2 * reach, end, SliceType::kInverse});
  }
  bool Sees(int64_t q, int64_t k) const { return seen_[Index(q, k)]; }
  int64_t tokens() const { return tokens_; }

 private:
  size_t Index(int64_t q, int64_t k) const { return static_cast<size_t>(q * tokens_ + k); }
  int64_t tokens_;
  std::vector<bool> seen_;
};

void ExpectSame(const AttentionPattern& pattern, const std::vector<int64_t>& ends,
                const Oracle& oracle) {
  SCOPED_TRACE(pattern.ToString());
  const int64_t tokens = oracle.tokens();
  const auto documents = std::make_shared<Documents>(Documents::FromEnds(tokens, {ends}));
  const auto all = ops::BlockList::All(*documents);
  const auto mask = ops::BlockMask::Build(pattern, 1, documents, all, all);
  std::string picture;
  int64_t pairs = 0;
  for (int32_t i = 0; i < all.size(); ++i) {
    for (int32_t j = 0; j < all.size(); ++j) {
      uint64_t bits[64];
      ops::VisibleBitsOfQueries(mask->rule(), *documents, 0, i, j, bits);
      int64_t seen = 0, possible = 0;
      for (int64_t q = i * 64; q < std::min<int64_t>(tokens, i * 64 + 64); ++q) {
        for (int64_t k = j * 64; k < std::min<int64_t>(tokens, j * 64 + 64); ++k, ++possible) {
          const bool want = oracle.Sees(q, k);
          ASSERT_EQ(Visible(mask->rule(), 0, q, k), want) << q << " " << k;
          ASSERT_EQ(bits[q % 64] >> k % 64 & 1, want) << q << " " << k;
          seen += want;
        }
      }
      pairs += seen;
      picture += seen == 0 ? '.' : seen == possible ? '#' : '+';
    }
    picture += '\n';
  }
  EXPECT_EQ(mask->Ascii(0), picture);
  EXPECT_EQ(mask->VisiblePairs(0), pairs);
}

constexpr int64_t kTokens = 1000;  // ends inside a block
const std::vector<int64_t> kOne = {kTokens};
const std::vector<int64_t> kEnds = {100, 228, 650, kTokens};  // of packed documents

std::vector<std::pair<int64_t, int64_t>> Pieces(const std::vector<int64_t>& ends) {
  std::vector<std::pair<int64_t, int64_t>> pieces;
  int64_t begin = 0;
  for (const int64_t end : ends) pieces.emplace_back(std::exchange(begin, end), end);
  return pieces;
}

TEST(MaskFamiliesTest, FullAndCausalWithAndWithoutDocuments) {
  for (const auto& ends : {kOne, kEnds}) {
    Oracle full(kTokens), causal(kTokens);
    for (const auto& [begin, end] : Pieces(ends)) {
      full.Add({begin, end, begin, end});
      causal.Add({begin, end, begin, end, SliceType::kCausal});
    }
    ExpectSame(AttentionPattern::Full(), ends, full);
    ExpectSame(AttentionPattern::Causal(), ends, causal);
  }
}

TEST(MaskFamiliesTest, SlidingWindows) {
  for (const int64_t window : {2, 64, 130}) {
    Oracle both(kTokens), causal(kTokens);
    both.AddBand(0, kTokens, window - 1);
    causal.Add({0, window, 0, window, SliceType::kCausal});
    causal.Add({window, kTokens, 1, kTokens, SliceType::kBoth});
    ExpectSame(AttentionPattern::Window(window, 0, true), kOne, both);
    ExpectSame(AttentionPattern::Window(window), kOne, causal);
  }
}

TEST(MaskFamiliesTest, SharedQuestion) {
  const std::vector<int64_t> lengths = {150, 64, 7, 279, 500};
  Oracle oracle(kTokens);
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    oracle.Add({begin, begin + length, begin, begin + length, SliceType::kCausal});
    if (begin > 0) oracle.Add({begin, begin + length, 0, lengths[0]});
    begin += length;
  }
  ExpectSame(AttentionPattern::SharedQuestion(lengths), kOne, oracle);
}

TEST(MaskFamiliesTest, CausalBlockwise) {
  const std::vector<int64_t> lengths = {150, 64, 7, 579, 200};
  Oracle oracle(kTokens);
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    const bool last = begin + length == kTokens;
    oracle.Add({begin, begin + length, last ? 0 : begin, begin + length, SliceType::kCausal});
    begin += length;
  }
  ExpectSame(AttentionPattern::CausalBlockwise(lengths), kOne, oracle);
}

TEST(MaskFamiliesTest, PrefixWithAndWithoutDocuments) {
  for (const auto& ends : {kOne, kEnds}) {
    for (const int64_t prefix : {1, 77, 192}) {
      Oracle oracle(kTokens);
      for (const auto& [begin, end] : Pieces(ends)) {
        const int64_t middle = std::min(end, begin + prefix);
        oracle.Add({begin, middle, begin, middle});
        oracle.Add({middle, end, begin, end, SliceType::kCausal});
      }
      ExpectSame(AttentionPattern::Prefix(prefix), ends, oracle);
    }
  }
}

TEST(MaskFamiliesTest, GlobalSlidingWindow) {
  for (const int64_t window : {2, 64, 130}) {
    Oracle oracle(kTokens);
    oracle.Add({0, window, 0, kTokens});
    oracle.Add({window, kTokens, 0, window});
    oracle.AddBand(window, kTokens, window - 1);
    ExpectSame(AttentionPattern::GlobalWindow(window, window, true), kOne, oracle);
  }
}

TEST(MaskFamiliesTest, BlockCausalDocuments) {
  constexpr int64_t kBlock = 128;
  const std::vector<int64_t> ends = {kBlock, 4 * kBlock, 6 * kBlock, kTokens};
  Oracle oracle(kTokens);
  for (const auto& [begin, end] : Pieces(ends)) {
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t stop = std::min(end, block + kBlock);
      oracle.Add({block, stop, begin, stop});
    }
  }
  ExpectSame(AttentionPattern::BlockCausal(kBlock), ends, oracle);
}

void ExpectRandomBlocks(ops::RandomBlocksOptions random) {
  random.bidirectional = true;
  random.own_block = false;
  const RandomDraws draws(random, 0);
  const auto token = [&](int64_t tile, int side) {
    return std::min(kTokens, draws.Begin(tile, side) * random.block_size);
  };
  Oracle oracle(kTokens);
  int64_t tiles = 0, drawn = 0;
  for (int64_t i = 0; token(i, 0) < kTokens; ++i) {
    for (int64_t j = 0; token(j, 1) < kTokens; ++j, ++tiles) {
      if (!draws.Drawn(i, j)) continue;
      oracle.Add({token(i, 0), token(i + 1, 0), token(j, 1), token(j + 1, 1)});
      ++drawn;
    }
  }
  ExpectSame(AttentionPattern::RandomBlocks(random), kOne, oracle);
  const double share = static_cast<double>(drawn) / static_cast<double>(tiles);
  EXPECT_NEAR(share, random.density, 4 * std::sqrt(0.25 / static_cast<double>(tiles)));
}

TEST(MaskFamiliesTest, UniformBlockSparse) {
  for (const double density : {0.1, 0.5, 1.0}) {
    ExpectRandomBlocks({.block_size = 64, .density = density, .seed = 3});
    ExpectRandomBlocks({.block_size = 128, .density = density, .seed = 4});
  }
}

TEST(MaskFamiliesTest, VariableBlockSparse) {
  for (const double density : {0.2, 0.5}) {
    ExpectRandomBlocks(
        {.block_size = 64, .density = density, .seed = 5, .mean_blocks = 4, .min_blocks = 2});
    ExpectRandomBlocks(
        {.block_size = 16, .density = density, .seed = 6, .mean_blocks = 9, .min_blocks = 3});
    ExpectRandomBlocks(
        {.block_size = 32, .density = density, .seed = 7, .mean_blocks = 2, .min_blocks = 1});
  }
}

// Tiles have the sizes that the pattern promises, and the borders of queries are not those of keys.
TEST(MaskFamiliesTest, VariableTilesKeepTheirSizes) {
  constexpr int64_t kTiles = 2000;
  const Documents documents = Documents::OnePerRow(1, 64);
  for (const auto& [mean, min] : {std::pair{8, 3}, {8, 2}, {9, 1}, {3, 2}, {2, 1}, {4, 4}}) {
    SCOPED_TRACE(Str("mean ", mean, " min ", min));
    const ops::RandomBlocksOptions random{.mean_blocks = mean, .min_blocks = min};
    const AttentionPattern pattern = AttentionPattern::RandomBlocks(random);
    const ops::VisibleRule rule = ops::MakeVisibleRule(pattern, 1, documents);
    const ops::RandomKey key = ops::RandomKeyOf(rule.seed, rule.per_head, 0);
    const RandomDraws draws(random, 0);
    std::map<int64_t, int64_t> tiles_of_size;
    int64_t equal = 0;
    for (int64_t i = 0; i < kTiles; ++i) {
      for (const int side : {0, 1}) {
        const auto at = static_cast<uint32_t>(side);
        const int64_t begin = ops::TileBegin(rule, key, at, i);
        const int64_t end = ops::TileBegin(rule, key, at, i + 1);
        ASSERT_EQ(begin, draws.Begin(i, side));
        for (int64_t b = begin; b < end; ++b) ASSERT_EQ(ops::TileOf(rule, key, at, b), i);
        ++tiles_of_size[end - begin];
      }
      equal += draws.Begin(i, 0) == draws.Begin(i, 1);
    }
    EXPECT_EQ(tiles_of_size.begin()->first, min);
    EXPECT_EQ(tiles_of_size.rbegin()->first, 2 * mean - min);
    for (const uint32_t side : {0u, 1u}) {
      EXPECT_LE(std::abs(ops::TileBegin(rule, key, side, kTiles) - mean * kTiles), mean - min);
    }
    const double places = mean - min + 1;
    EXPECT_NEAR(static_cast<double>(equal) / kTiles, 1 / places, 4 * std::sqrt(0.25 / kTiles));
  }
}

// Rows of more tiles than are hashed at a time (256), whole and in parts, by the draws of every
// pair of blocks.
void ExpectTiles(const ops::RandomBlocksOptions& random, int64_t mask_blocks, int32_t first_query,
                 int32_t first_key) {
  const AttentionPattern pattern = AttentionPattern::RandomBlocks(random);
  SCOPED_TRACE(Str(pattern.ToString(), " from ", first_query, " and ", first_key));
  const int64_t each = 64 / random.block_size;
  const RandomDraws draws(random, 0);
  std::vector<int64_t> tile[2];  // of every block, by side
  for (const int side : {0, 1}) {
    int64_t at = 0;
    for (int64_t b = 0; b < mask_blocks * each; ++b) {
      at += draws.Begin(at + 1, side) == b;
      tile[side].push_back(at);
    }
    ASSERT_GT(at, 300);
  }
  const auto documents =
      std::make_shared<Documents>(Documents::OnePerRow(1, mask_blocks * ops::kMaskBlock));
  const auto from = [&](int32_t first) {
    std::vector<int32_t> ids(static_cast<size_t>(mask_blocks - first));
    std::iota(ids.begin(), ids.end(), first);
    return ops::BlockList::FromIds(*documents, ids);
  };
  const ops::BlockList queries = from(first_query), keys = from(first_key);
  const auto mask = ops::BlockMask::Build(pattern, 1, documents, queries, keys);
  const auto cell = [&](int32_t i, int32_t j) {
    int64_t seen = 0;
    for (int64_t a = i * each; a < (i + 1) * each; ++a) {
      for (int64_t b = j * each; b < (j + 1) * each; ++b) {
        seen += draws.Drawn(tile[0][static_cast<size_t>(a)], tile[1][static_cast<size_t>(b)]);
      }
    }
    return seen == 0 ? '.' : seen == each * each ? '#' : '+';
  };
  const auto line = [](std::span<const ops::BlockRun> runs, const ops::BlockList& others) {
    std::string text(others.ids.size(), '.');
    for (const ops::BlockRun& run : runs) {
      for (int32_t n = 0; n < run.count; ++n) {
        text[static_cast<size_t>(run.block(n) - others.ids.front())] =
            run.kind() == ops::BlockKind::kFull ? '#' : '+';
      }
    }
    return text;
  };
  std::map<char, int64_t> cells;
  for (int64_t i = 0; i < queries.size(); ++i) {
    std::string want;
    for (const int32_t j : keys.ids) want += cell(queries.ids[static_cast<size_t>(i)], j);
    ASSERT_EQ(line(mask->row_runs().Row(0, i), keys), want) << "query block " << i;
    for (const char c : want) ++cells[c];
  }
  for (int64_t j = 0; j < keys.size(); ++j) {
    std::string want;
    for (const int32_t i : queries.ids) want += cell(i, keys.ids[static_cast<size_t>(j)]);
    ASSERT_EQ(line(mask->column_runs().Row(0, j), queries), want) << "key block " << j;
  }
  EXPECT_GT(cells['+'], 20);
  EXPECT_GT(cells[random.density < 0.5 ? '.' : '#'], 20);
}

TEST(MaskFamiliesTest, RowsOfManySmallTiles) {
  for (const double density : {0.05, 0.9}) {
    ops::RandomBlocksOptions random{
        .block_size = 16, .density = density, .seed = 8, .bidirectional = true, .own_block = false};
    ExpectTiles(random, 90, 0, 0);
    ExpectTiles(random, 90, 85, 12);
    ExpectTiles(random, 90, 12, 85);
    random.mean_blocks = 2;
    ExpectTiles(random, 165, 0, 0);
    ExpectTiles(random, 165, 90, 3);
  }
}

}  // namespace
}  // namespace longspan::test
