#include "ops/attention/pattern.h"

#include <gtest/gtest.h>

#include "ops/attention/documents.h"
#include "ops/core/error.h"
#include "tests/ops/attention/mask_cases.h"
#include "tests/ops/attention/reference.h"

namespace longspan::test {
namespace {

using ops::AttentionPattern;
using ops::Documents;
using ops::S2Options;

// The one problem of a pattern starts with the field it names.
void ExpectProblem(const AttentionPattern& pattern, int64_t kv_heads, const std::string& field) {
  const auto problems = pattern.Problems(kv_heads);
  ASSERT_EQ(problems.size(), 1u) << field;
  EXPECT_EQ(problems[0].rfind(field + ": ", 0), 0u) << problems[0];
}

TEST(PatternTest, UsablePatternsHaveNoProblems) {
  EXPECT_TRUE(AttentionPattern::Full().Problems(1).empty());
  EXPECT_TRUE(AttentionPattern::Causal().Problems(8).empty());
  EXPECT_TRUE(AttentionPattern::Window(1).Problems(8).empty());
  EXPECT_TRUE(AttentionPattern::Window(4096, 4).Problems(8).empty());
  for (const NamedPattern& p : Patterns()) EXPECT_TRUE(p.pattern.Problems(4).empty()) << p.name;
}

TEST(PatternTest, ProblemsNameTheField) {
  ExpectProblem(AttentionPattern::Causal(), 0, "kv heads");
  ExpectProblem(AttentionPattern::Window(0), 4, "window");
  ExpectProblem(AttentionPattern::Window(5, -1), 4, "sinks");
  ExpectProblem(AttentionPattern::S2({.block_size = 48}), 4, "s2.block_size");
  ExpectProblem(AttentionPattern::S2({.block_size = 8}), 4, "s2.block_size");
  ExpectProblem(AttentionPattern::S2({.local_blocks = 0}), 4, "s2.local_blocks");
  ExpectProblem(AttentionPattern::S2({.stride_blocks = 0}), 4, "s2.stride_blocks");
  ExpectProblem(AttentionPattern::S2({.head_step = -1}), 4, "s2.head_step");
  ExpectProblem(AttentionPattern::S2({.head_offset = -1}), 4, "s2.head_offset");
  ExpectProblem(AttentionPattern::S2({.dense_heads = 5}), 4, "s2.dense_heads");
  ExpectProblem(AttentionPattern::S2({.homogeneous = true, .dense_heads = 1}), 4, "s2.dense_heads");
  ExpectProblem(AttentionPattern::S2({.homogeneous = true, .head_step = 1}), 4, "s2.head_step");
  EXPECT_EQ(AttentionPattern::Window(0, -1).Problems(4).size(), 2u);
}

// Cases of the published pattern whose heads leave parts of the context out.
TEST(PatternTest, IncompleteCoverageIsAProblemWithARemedy) {
  const auto s2 = [](int64_t stride) { return AttentionPattern::S2({.stride_blocks = stride}); };
  EXPECT_TRUE(s2(8).Problems(8).empty());
  EXPECT_TRUE(s2(16).Problems(16).empty());
  ExpectProblem(s2(16), 8, "s2.stride_blocks");
  EXPECT_DOUBLE_EQ(s2(16).Coverage(8), 0.5);
  EXPECT_NE(s2(16).Problems(8)[0].find("stride_blocks <= 8"), std::string::npos);
  EXPECT_NE(s2(16).Problems(8)[0].find("50 %"), std::string::npos);
  ExpectProblem(AttentionPattern::S2({.stride_blocks = 4, .head_step = 2}), 4, "s2.stride_blocks");
  EXPECT_TRUE(AttentionPattern::S2({.stride_blocks = 16, .dense_heads = 1}).Problems(8).empty());
  EXPECT_TRUE(AttentionPattern::S2({.stride_blocks = 16, .homogeneous = true}).Problems(8).empty());
  EXPECT_TRUE(AttentionPattern::S2({.stride_blocks = 16, .allow_incomplete_coverage = true})
                  .Problems(8)
                  .empty());
  // 3 is coprime to 8, so steps of 3 reach every residue.
  EXPECT_DOUBLE_EQ(AttentionPattern::S2({.stride_blocks = 8, .head_step = 3}).Coverage(8), 1);
}

TEST(PatternTest, DefaultHeadStepSpreadsTheHeads) {
  const auto step = [](int64_t stride, int64_t kv_heads) {
    return AttentionPattern::S2({.stride_blocks = stride}).HeadStep(kv_heads);
  };
  EXPECT_EQ(step(16, 8), 2);
  EXPECT_EQ(step(8, 8), 1);
  EXPECT_EQ(step(2, 8), 1);
  EXPECT_EQ(AttentionPattern::S2({.stride_blocks = 8, .homogeneous = true}).HeadStep(2), 0);
}

TEST(PatternTest, ToStringTellsPatternsApart) {
  EXPECT_EQ(AttentionPattern::S2({.local_blocks = 4, .stride_blocks = 4}).ToString(),
            "s2 block 64 local 4 stride 4");
  EXPECT_EQ(AttentionPattern::Window(128, 4).ToString(), "window 128 sinks 4");
  const auto patterns = Patterns();
  for (size_t i = 0; i < patterns.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(patterns[i].name, patterns[j].name);
  }
}

TEST(VisibleTest, AgreesWithTheWordsOfThePattern) {
  int64_t visible = 0, hidden = 0;
  for (const NamedDocuments& documents : DocumentSets()) {
    const Documents& d = *documents.documents;
    const int64_t n = d.tokens(), step = n > 500 ? 7 : 1;  // odd step: all residues occur
    for (const NamedPattern& p : Patterns()) {
      const auto rule = ops::MakeVisibleRule(p.pattern, 4, d);
      for (int64_t head = 0; head < 4; ++head) {
        for (int64_t q = 0; q < n; q += step) {
          for (int64_t k = q % 5; k < n; k += 5) {
            const bool want = Sees(p.pattern, 4, d, head, q, k);
            ASSERT_EQ(ops::Visible(rule, head, q, k), want)
                << p.name << " | " << documents.name << " head " << head << " " << q << " " << k;
            ++(want ? visible : hidden);
          }
        }
      }
    }
  }
  EXPECT_GT(visible, 100000);
  EXPECT_GT(hidden, 100000);
}

TEST(DocumentsTest, BeginsAndEndsAreGlobal) {
  const Documents d = Documents::FromEnds(5, {{2, 5}, {5}});
  EXPECT_EQ(d.rows, 2);
  EXPECT_EQ(d.doc_begin, (std::vector<int32_t>{0, 0, 2, 2, 2, 5, 5, 5, 5, 5}));
  EXPECT_EQ(d.doc_end, (std::vector<int32_t>{2, 2, 5, 5, 5, 10, 10, 10, 10, 10}));
  EXPECT_EQ(Documents::OnePerRow(2, 5), Documents::FromEnds(5, {{5}, {5}}));
}

TEST(DocumentsTest, RejectsEndsThatDoNotTileTheRow) {
  EXPECT_THROW(Documents::FromEnds(5, {{5}, {2, 2, 5}}), InvalidArgument);
  EXPECT_THROW(Documents::FromEnds(5, {{3, 2, 5}}), InvalidArgument);
  EXPECT_THROW(Documents::FromEnds(5, {{4}}), InvalidArgument);
  EXPECT_THROW(Documents::FromEnds(5, {{6}}), InvalidArgument);
  EXPECT_THROW(Documents::FromEnds(5, {{}}), InvalidArgument);
  EXPECT_THROW(Documents::FromEnds(5, {{0, 5}}), InvalidArgument);
  EXPECT_THROW(Documents::OnePerRow(1, 0), InvalidArgument);
  EXPECT_THROW(Documents::OnePerRow(int64_t{1} << 20, int64_t{1} << 11), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
