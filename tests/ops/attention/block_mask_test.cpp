#include "ops/attention/block_mask.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdio>

#include "ops/attention/id_set.h"
#include "ops/core/error.h"

namespace longspan::test {
namespace {

using ops::AttentionPattern;
using ops::BlockList;
using ops::BlockMask;
using ops::Documents;

std::shared_ptr<const Documents> OneRow(int64_t tokens) {
  return std::make_shared<Documents>(Documents::OnePerRow(1, tokens));
}

std::shared_ptr<const BlockMask> WholeRow(const AttentionPattern& pattern, int64_t kv_heads,
                                          int64_t tokens) {
  const auto documents = OneRow(tokens);
  const auto all = BlockList::All(*documents);
  return BlockMask::Build(pattern, kv_heads, documents, all, all);
}

TEST(BlockMaskTest, PicturesOfThePatterns) {
  EXPECT_EQ(WholeRow(AttentionPattern::Causal(), 1, 256)->Ascii(0),
            "+...\n"
            "#+..\n"
            "##+.\n"
            "###+\n");
  EXPECT_EQ(WholeRow(AttentionPattern::Full(), 1, 130)->Ascii(0), "###\n###\n###\n");
  EXPECT_EQ(WholeRow(AttentionPattern::Window(65, 1), 1, 320)->Ascii(0),
            "+....\n"
            "++...\n"
            "+++..\n"
            "+.++.\n"
            "+..++\n");
  const auto s2 = WholeRow(AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 3}), 3, 384);
  EXPECT_EQ(s2->Ascii(0),
            "+.....\n"
            "#+....\n"
            "#.+...\n"
            "#..+..\n"
            "#..#+.\n"
            "#..#.+\n");
  EXPECT_EQ(s2->Ascii(1),  // (J + 1) mod 3 == 0
            "+.....\n"
            ".+....\n"
            "..+...\n"
            "..#+..\n"
            "..#.+.\n"
            "..#..+\n");
}

TEST(BlockMaskTest, LargePicturesAreScaled) {
  const std::string text = WholeRow(AttentionPattern::Causal(), 1, 64 * 100)->Ascii(0, 10);
  EXPECT_EQ(text.size(), 10u * 11u);
  EXPECT_EQ(text.substr(0, 11), "#.........\n");  // rows 0 to 9: '#' is the strongest entry
  EXPECT_EQ(text.substr(9 * 11, 11), "##########\n");
}

TEST(BlockMaskTest, RunsOfUsualPatternsAreConstantPerRow) {
  const int64_t blocks = 4096;
  const auto runs = [&](const AttentionPattern& pattern) {
    const auto mask = WholeRow(pattern, 4, blocks * 64);
    return (mask->row_runs().runs.size() + mask->column_runs().runs.size()) /
           static_cast<size_t>(2 * mask->patterns() * blocks);
  };
  EXPECT_LE(runs(AttentionPattern::Full()), 1u);
  EXPECT_LE(runs(AttentionPattern::Causal()), 2u);
  EXPECT_LE(runs(AttentionPattern::Window(1000, 4)), 4u);
  EXPECT_LE(runs(AttentionPattern::S2({.local_blocks = 16, .stride_blocks = 4})), 3u);
}

TEST(BlockMaskTest, HeadsWithEqualRulesShareAPattern) {
  const auto patterns = [](const AttentionPattern& pattern) {
    return WholeRow(pattern, 8, 640)->patterns();
  };
  EXPECT_EQ(patterns(AttentionPattern::Causal()), 1);
  EXPECT_EQ(patterns(AttentionPattern::S2({.stride_blocks = 8})), 8);
  EXPECT_EQ(patterns(AttentionPattern::S2({.stride_blocks = 4})), 4);
  EXPECT_EQ(patterns(AttentionPattern::S2({.stride_blocks = 1})), 1);
  EXPECT_EQ(patterns(AttentionPattern::S2({.stride_blocks = 4, .homogeneous = true})), 1);
  EXPECT_EQ(patterns(AttentionPattern::S2({.stride_blocks = 8, .dense_heads = 6})), 3);
  const auto mask = WholeRow(AttentionPattern::S2({.stride_blocks = 8, .dense_heads = 6}), 8, 640);
  EXPECT_NE(mask->pattern_of(0), mask->pattern_of(1));
  EXPECT_EQ(mask->pattern_of(2), mask->pattern_of(7));
  EXPECT_EQ(mask->head_of(mask->pattern_of(7)), 2);
  const auto spans = WholeRow(
      AttentionPattern::Spans({{100, 4}, {}, {100, 4}, {640, 0}, {100, 5}, {}, {99, 4}, {700, 9}}),
      8, 640);
  EXPECT_EQ(spans->patterns(), 4);
  EXPECT_EQ(spans->pattern_of(0), spans->pattern_of(2));
  EXPECT_EQ(spans->pattern_of(1), spans->pattern_of(3));  // a window of the whole row
  EXPECT_EQ(spans->pattern_of(1), spans->pattern_of(7));
  EXPECT_NE(spans->pattern_of(0), spans->pattern_of(4));
  EXPECT_NE(spans->pattern_of(0), spans->pattern_of(6));
}

// The promise about long rows: memory by the number of runs, and for random blocks by what is
// drawn. Times are printed only; a busy machine must not fail a test.
TEST(BlockMaskTest, MillionTokensBuildQuicklyAndStaySmall) {
  const int64_t tokens = int64_t{1} << 20, blocks = tokens / 64;
  const auto documents = OneRow(tokens);
  const auto all = BlockList::All(*documents);
  const double per_row = 2.0 * static_cast<double>(blocks);  // rows and columns
  struct Case {
    AttentionPattern pattern;
    double runs;  // in a row or column, at most on average
  };
  const ops::RandomBlocksOptions uniform{.block_size = 64, .density = 0.01},
      variable{.block_size = 64, .density = 0.01, .mean_blocks = 8, .min_blocks = 2};
  for (const auto& [pattern, runs] : {
           Case{AttentionPattern::Causal(), 2},
           Case{AttentionPattern::S2({.local_blocks = 16, .stride_blocks = 8}), 2.5},
           Case{AttentionPattern::Window(4096, 64, true), 5},
           Case{AttentionPattern::GlobalWindow(4096, 64, true), 5},
           Case{AttentionPattern::Power({256, 5, 1}), 13},
           Case{AttentionPattern::Dilated({64, 16, 4}), 16},
           Case{AttentionPattern::Prefix(4096), 2},
           Case{AttentionPattern::SharedQuestion({4096, 1000}), 4},
           Case{AttentionPattern::CausalBlockwise({4096, 1000}), 4},
           Case{AttentionPattern::BlockCausal(1024), 1},
           Case{AttentionPattern::Spans({{}, {4096, 64}, {}, {}, {}, {}, {}, {}}), 4},
           Case{AttentionPattern::RandomBlocks(uniform), 0.01 * static_cast<double>(blocks) / 1.9},
           Case{AttentionPattern::RandomBlocks(variable), 0.01 * static_cast<double>(blocks) / 13},
       }) {
    const auto start = std::chrono::steady_clock::now();
    const auto mask = BlockMask::Build(pattern, 8, documents, all, all);
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - start;
    const size_t held = mask->row_runs().runs.size() + mask->column_runs().runs.size();
    const double patterns = static_cast<double>(mask->patterns());
    std::printf("%-60s %3.0f patterns %8.1f ms %8.2f MB %7.1f runs a row\n",
                pattern.ToString().c_str(), patterns, ms.count(),
                static_cast<double>(mask->bytes()) * 1e-6,
                static_cast<double>(held) / patterns / per_row);
    EXPECT_LT(static_cast<double>(held), runs * patterns * per_row + 100) << pattern.ToString();
    EXPECT_GT(mask->bytes(), held * sizeof(ops::BlockRun));
    // Beside the runs: offsets of each pattern's rows and columns, and the two lists of blocks.
    EXPECT_LT(
        static_cast<double>(mask->bytes()),
        static_cast<double>(held * sizeof(ops::BlockRun)) + (8 * patterns + 14) * per_row + 4096)
        << pattern.ToString();
  }
  EXPECT_EQ(WholeRow(AttentionPattern::Causal(), 8, tokens)->VisiblePairs(3),
            tokens * (tokens + 1) / 2);
}

// Different words for the same mask.
TEST(BlockMaskTest, PatternsThatMeanTheSame) {
  const auto documents =
      std::make_shared<Documents>(Documents::FromEnds(500, {{500}, {30, 290, 500}}));
  const auto all = BlockList::All(*documents);
  const auto expect = [&](const AttentionPattern& a, const AttentionPattern& b) {
    const auto one = BlockMask::Build(a, 3, documents, all, all);
    const auto other = BlockMask::Build(b, 3, documents, all, all);
    for (int64_t h = 0; h < 3; ++h) {
      EXPECT_EQ(one->Ascii(h), other->Ascii(h)) << a.ToString() << " and " << b.ToString();
      EXPECT_EQ(one->VisiblePairs(h), other->VisiblePairs(h))
          << a.ToString() << " and " << b.ToString();
    }
  };
  const AttentionPattern causal = AttentionPattern::Causal(), full = AttentionPattern::Full();
  expect(AttentionPattern::Window(500), causal);
  expect(AttentionPattern::Window(500, 0, true), full);
  expect(AttentionPattern::Window(1, 500), causal);
  expect(AttentionPattern::S2({.stride_blocks = 1}), causal);
  expect(AttentionPattern::S2({.block_size = 16, .local_blocks = 32, .stride_blocks = 3}), causal);
  expect(AttentionPattern::GlobalWindow(70, 9), AttentionPattern::Window(70, 9));
  expect(AttentionPattern::GlobalWindow(1, 500, true), full);
  expect(AttentionPattern::GlobalWindow(40, 0, true), AttentionPattern::Window(40, 0, true));
  expect(AttentionPattern::Power({16, 32, 0}), causal);
  expect(AttentionPattern::Power({64, 1, 8}), causal);
  expect(AttentionPattern::Dilated({32, 16, 1}), causal);
  expect(AttentionPattern::Dilated({32, 16, 1, true}), full);
  expect(AttentionPattern::Dilated({64, 1, 1}), AttentionPattern::Dilated({64, 7, 100}));
  expect(AttentionPattern::Prefix(500), full);
  expect(AttentionPattern::Prefix(0), causal);
  expect(AttentionPattern::SharedQuestion({500}), causal);
  expect(AttentionPattern::CausalBlockwise({500}), causal);
  expect(AttentionPattern::CausalBlockwise({200, 300, 1000}),
         AttentionPattern::CausalBlockwise({200, 300}));
  expect(AttentionPattern::BlockCausal(512), full);
  expect(AttentionPattern::RandomBlocks({.density = 1}), causal);
  expect(AttentionPattern::RandomBlocks({.density = 1, .bidirectional = true, .own_block = false}),
         full);
  // All tiles with 3 blocks are as large as blocks of 3 times the size, had that been allowed: with
  // 4 blocks they are.
  expect(
      AttentionPattern::RandomBlocks({.block_size = 16,
                                      .density = 0.4,
                                      .mean_blocks = 4,
                                      .min_blocks = 4,
                                      .own_block = false,
                                      .phase = ops::StridePhase::kRow}),
      AttentionPattern::RandomBlocks(
          {.block_size = 64, .density = 0.4, .own_block = false, .phase = ops::StridePhase::kRow}));
  expect(AttentionPattern::Spans({{}, {}, {}}), causal);
  expect(AttentionPattern::Spans({{70, 9}, {70, 9}, {70, 9}}), AttentionPattern::Window(70, 9));
}

// A document sees the same wherever it lies in the row, if it begins on a block border.
TEST(BlockMaskTest, PhaseDocumentDoesNotDependOnTheNeighbours) {
  const auto alone = OneRow(512);
  const auto packed = std::make_shared<Documents>(Documents::FromEnds(1024, {{192, 704, 1024}}));
  const auto shifted = BlockList::FromIds(*packed, {3, 4, 5, 6, 7, 8, 9, 10});
  for (ops::RandomBlocksOptions random :
       {ops::RandomBlocksOptions{.density = 0.4},
        ops::RandomBlocksOptions{.density = 0.4, .mean_blocks = 3, .bidirectional = true}}) {
    const auto picture = [&](const auto& documents, const BlockList& list) {
      return BlockMask::Build(AttentionPattern::RandomBlocks(random), 1, documents, list, list)
          ->Ascii(0);
    };
    const std::string want = picture(alone, BlockList::All(*alone));
    EXPECT_EQ(picture(packed, shifted), want);
    random.phase = ops::StridePhase::kRow;
    EXPECT_EQ(picture(alone, BlockList::All(*alone)), want);
    EXPECT_NE(picture(packed, shifted), want);
  }
}

// The first tile is drawn like all others, also for the seed that is the default.
TEST(BlockMaskTest, FirstTileIsVisibleAsOftenAsTheDensitySays) {
  const auto documents = OneRow(16);
  const auto sees = [&](double density, int64_t seed, bool per_head) {
    const auto pattern = AttentionPattern::RandomBlocks({.block_size = 16,
                                                         .density = density,
                                                         .seed = seed,
                                                         .per_head = per_head,
                                                         .own_block = false});
    return ops::Visible(ops::MakeVisibleRule(pattern, 1, *documents), 0, 0, 0);
  };
  constexpr int64_t kSeeds = 4000;
  for (const bool per_head : {false, true}) {
    for (const double density : {0.05, 0.5}) {
      int64_t seen = 0;
      for (int64_t seed = 0; seed < kSeeds; ++seed) seen += sees(density, seed, per_head);
      const double share = static_cast<double>(seen) / kSeeds;
      EXPECT_NEAR(share, density, 4 * std::sqrt(density * (1 - density) / kSeeds));
    }
    for (int64_t seed = 0; seed < 100; ++seed) EXPECT_FALSE(sees(1e-6, seed, per_head)) << seed;
  }
}

TEST(BlockMaskTest, SeedsAndHeadsDrawForThemselves) {
  const auto draw = [](int64_t seed, bool per_head) {
    return WholeRow(
        AttentionPattern::RandomBlocks(
            {.density = 0.3, .seed = seed, .bidirectional = true, .per_head = per_head}),
        3, 64 * 40);
  };
  EXPECT_EQ(draw(1, false)->patterns(), 1);
  EXPECT_EQ(draw(1, false)->Ascii(2), draw(1, false)->Ascii(0));
  EXPECT_NE(draw(1, false)->Ascii(0), draw(2, false)->Ascii(0));
  const auto heads = draw(1, true);
  EXPECT_EQ(heads->patterns(), 3);
  EXPECT_NE(heads->Ascii(0), heads->Ascii(1));
  EXPECT_NE(heads->Ascii(1), heads->Ascii(2));
  // 1600 tiles of 40 x 40: rows and columns must not repeat each other either.
  const std::string picture = heads->Ascii(0);
  for (size_t a = 0; a < 40; ++a) {
    for (size_t b = 0; b < a; ++b) {
      size_t equal = 0;
      for (size_t i = 0; i < 40; ++i) equal += picture[a * 41 + i] == picture[b * 41 + i];
      EXPECT_LT(equal, 38u) << "rows " << a << " and " << b;
    }
  }
}

TEST(BlockMaskTest, BlockListsKnowShortBlocksAndRefuseBadIds) {
  const Documents documents = Documents::OnePerRow(2, 100);
  const auto list = BlockList::FromIds(documents, {3, 0});
  EXPECT_EQ(list.token_begin, (std::vector<int64_t>{0, 36, 100}));
  EXPECT_EQ(ops::BlockFirstToken(100, 3), 164);
  EXPECT_EQ(ops::BlockTokens(100, 3), 36);
  EXPECT_EQ(BlockList::All(documents).tokens(), 200);
  EXPECT_THROW(BlockList::FromIds(documents, {4}), InvalidArgument);
  EXPECT_THROW(BlockList::FromIds(documents, {-1}), InvalidArgument);
  EXPECT_THROW(BlockList::FromIds(documents, {1, 1}), InvalidArgument);
}

TEST(BlockMaskTest, RefusesAPatternWithProblems) {
  const auto documents = OneRow(128);
  const auto all = BlockList::All(*documents);
  EXPECT_THROW(
      BlockMask::Build(AttentionPattern::S2({.stride_blocks = 16}), 8, documents, all, all),
      InvalidArgument);
}

TEST(IdSetTest, IntersectionsOfRunsMatchEnumeration) {
  int common = 0;
  for (int64_t a_step : {1, 2, 3, 4, 6, 9}) {
    for (int64_t b_step : {1, 2, 3, 4, 6, 10}) {
      for (int64_t b_first : {0, 1, 5, 17}) {
        for (int64_t b_count : {1, 2, 9}) {
          const ops::IdRun a{7, 8, a_step}, b{b_first, b_count, b_step};
          std::vector<int64_t> want, got;
          for (int64_t i = 0; i < a.count; ++i) {
            const int64_t id = a.first + i * a_step;
            if (id >= b_first && id <= b.last() && (id - b_first) % b_step == 0) want.push_back(id);
          }
          const ops::IdRun both = ops::Intersect(a, b);
          for (int64_t i = 0; i < both.count; ++i) got.push_back(both.first + i * both.step);
          EXPECT_EQ(got, want) << a_step << " " << b_step << " " << b_first << " " << b_count;
          common += !want.empty();
        }
      }
    }
  }
  EXPECT_GT(common, 100);
}

}  // namespace
}  // namespace longspan::test
