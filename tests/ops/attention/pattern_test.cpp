#include "ops/attention/pattern.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

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
  ExpectProblem(AttentionPattern::GlobalWindow(0, 1), 4, "window");
  ExpectProblem(AttentionPattern::GlobalWindow(1, -1), 4, "global_tokens");
  ExpectProblem(AttentionPattern::Power({48, 1, 0}), 4, "power.block_size");
  ExpectProblem(AttentionPattern::Power({64, 0, 0}), 4, "power.local_blocks");
  ExpectProblem(AttentionPattern::Power({64, 1, -1}), 4, "power.sink_blocks");
  ExpectProblem(AttentionPattern::Dilated({8, 1, 1}), 4, "dilated.block_size");
  ExpectProblem(AttentionPattern::Dilated({64, 0, 1}), 4, "dilated.neighbours");
  ExpectProblem(AttentionPattern::Dilated({64, 1, 0}), 4, "dilated.dilation");
  ExpectProblem(AttentionPattern::Prefix(-1), 4, "prefix");
  ExpectProblem(AttentionPattern::BlockCausal(100), 4, "block_causal.block_size");
  for (const auto& lengths : {std::vector<int64_t>{}, {5, 0}, {0}, {5, -3}, {int64_t{1} << 32}}) {
    ExpectProblem(AttentionPattern::SharedQuestion(lengths), 4, "shared_question.segment");
    ExpectProblem(AttentionPattern::CausalBlockwise(lengths), 4, "causal_blockwise.segment");
  }
  const auto random = [](const ops::RandomBlocksOptions& options, const std::string& field) {
    ExpectProblem(AttentionPattern::RandomBlocks(options), 4, "random_blocks." + field);
  };
  random({.block_size = 24}, "block_size");
  random({.density = 0}, "density");
  random({.density = 1.01}, "density");
  random({.density = std::nan("")}, "density");
  random({.seed = -1}, "seed");
  random({.mean_blocks = 0}, "mean_blocks");
  random({.mean_blocks = 3, .min_blocks = 4}, "min_blocks");
  random({.mean_blocks = 3, .min_blocks = 0}, "min_blocks");
  ExpectProblem(AttentionPattern::Spans({{}, {}, {}}), 4, "spans.head");
  ExpectProblem(AttentionPattern::Spans({{}, {}, {}, {}, {}}), 4, "spans.head");
  ExpectProblem(AttentionPattern::Spans({{}, {-1, 0}, {}, {}}), 4, "spans.head[1].window");
  ExpectProblem(AttentionPattern::Spans({{}, {}, {5, -1}, {}}), 4, "spans.head[2].sinks");
  ExpectProblem(AttentionPattern::Spans({{0, 5}, {}, {}, {}}), 4, "spans.head[0].sinks");
}

// Sums of lengths that do not fit into 64 bits, and ends that callers set themselves.
TEST(PatternTest, HugeSegmentsAreProblemsThatSayTheLength) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const auto expect = [](const AttentionPattern& pattern, int64_t length) {
    const auto problems = pattern.Problems(1);
    ASSERT_EQ(problems.size(), 1u);
    EXPECT_NE(problems[0].find(Str(".segment: ", length, " is not")), std::string::npos)
        << problems[0];
    EXPECT_NE(pattern.ToString().find(Str(" ", length)), std::string::npos) << pattern.ToString();
  };
  for (const int64_t huge : {kMost, -kMost - 1, kMost - 4}) {
    for (const auto& lengths :
         {std::vector<int64_t>{huge}, {5, huge}, {5, huge, huge}, {7, 8, huge, 9}}) {
      expect(AttentionPattern::SharedQuestion(lengths), huge);
      expect(AttentionPattern::CausalBlockwise(lengths), huge);
    }
  }
  AttentionPattern pattern = AttentionPattern::SharedQuestion({5, 6});
  pattern.segment_ends = {5, -kMost - 1};
  EXPECT_EQ(pattern.Problems(1).size(), 1u);
  pattern.segment_ends = {-kMost - 1, kMost};
  EXPECT_EQ(pattern.Problems(1).size(), 1u);
}

// Asked of many pairs of one document; the answer decides whether a pattern may be trained with.
TEST(PatternTest, LooksAheadWhereALaterKeyIsSeen) {
  const Documents d = Documents::OnePerRow(1, 500);
  for (const NamedPattern& p : Patterns()) {
    bool ahead = false;
    for (int64_t head = 0; head < 4; ++head) {
      for (int64_t q = 0; q < 500; q += 5) {
        for (int64_t k = q + 1; k < 500; k += 3) ahead = ahead || Sees(p.pattern, 4, d, head, q, k);
      }
    }
    // A window of one token looks ahead by its name only.
    if (p.name == "window 1 bidirectional") continue;
    EXPECT_EQ(p.pattern.LooksAhead(), ahead) << p.name;
  }
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
  // A resumed run compares these texts, so they tell everything.
  const auto density = [](double value) {
    return AttentionPattern::RandomBlocks({.density = value}).ToString();
  };
  EXPECT_EQ(density(0.1), "random blocks 64 draw 2 density 0.1 seed 0");
  EXPECT_NE(density(0.1), density(0.1000000001));
  EXPECT_EQ(AttentionPattern::SharedQuestion({100, 20}).ToString(), "shared question 100 20");
  EXPECT_EQ(AttentionPattern::Spans({{}, {9, 4}}).ToString(), "spans causal, window 9 sinks 4");
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
