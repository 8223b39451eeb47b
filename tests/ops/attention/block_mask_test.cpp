#include "ops/attention/block_mask.h"

#include <gtest/gtest.h>

#include <chrono>

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
}

// The promise about long rows. The time limit is ten times what an idle core takes.
TEST(BlockMaskTest, MillionTokensBuildQuicklyAndStaySmall) {
  const int64_t tokens = int64_t{1} << 20;
  const auto documents = OneRow(tokens);
  const auto all = BlockList::All(*documents);
  for (const AttentionPattern& pattern :
       {AttentionPattern::Causal(),
        AttentionPattern::S2({.block_size = 64, .local_blocks = 16, .stride_blocks = 8})}) {
    const auto start = std::chrono::steady_clock::now();
    const auto mask = BlockMask::Build(pattern, 8, documents, all, all);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    EXPECT_LT(mask->bytes(), 16u << 20) << pattern.ToString();
    EXPECT_LT(seconds.count(), 0.5) << pattern.ToString();
    EXPECT_GT(mask->bytes(), mask->row_runs().runs.size() * sizeof(ops::BlockRun));
  }
  EXPECT_EQ(WholeRow(AttentionPattern::Causal(), 8, tokens)->VisiblePairs(3),
            tokens * (tokens + 1) / 2);
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
