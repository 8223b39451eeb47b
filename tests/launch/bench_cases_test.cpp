#include "launch/bench/cases.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "launch/picture/mask_facts.h"
#include "ops/core/error.h"

namespace longspan::launch {
namespace {

// The message of the InvalidArgument that `parse` throws for `name`.
template <class Case>
std::string Complaint(Case (*parse)(const std::string&), const std::string& name) {
  try {
    parse(name);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  ADD_FAILURE() << name << " was accepted";
  return "";
}

void ExpectMentions(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "no \"" << part << "\" in: " << text;
}

TEST(BenchCasesTest, ReadsEveryPattern) {
  const AttentionCase causal = ParseAttentionCase("causal_f32_T4096_Hq8_Hkv2_D64");
  EXPECT_EQ(causal.dtype, DType::kF32);
  EXPECT_EQ(causal.tokens, 4096);
  EXPECT_EQ(causal.heads, 8);
  EXPECT_EQ(causal.kv_heads, 2);
  EXPECT_EQ(causal.head_dim, 64);
  EXPECT_EQ(causal.document_tokens, 0);
  EXPECT_EQ(causal.pattern, ops::AttentionPattern::Causal());

  EXPECT_EQ(ParseAttentionCase("full_f64_T9_Hq1_Hkv1_D3").pattern, ops::AttentionPattern::Full());
  EXPECT_EQ(ParseAttentionCase("window_f32_T8192_Hq4_Hkv4_D64_W1024_S64").pattern,
            ops::AttentionPattern::Window(1024, 64));
  EXPECT_EQ(ParseAttentionCase("window_f32_T8192_Hq4_Hkv4_D64_W7").pattern,
            ops::AttentionPattern::Window(7, 0));
  const AttentionCase s2 = ParseAttentionCase("s2_bf16_T8192_Hq8_Hkv4_D64_B32_L5_V4_N1_P1000");
  EXPECT_EQ(s2.dtype, DType::kBF16);
  EXPECT_EQ(s2.document_tokens, 1000);
  EXPECT_EQ(s2.pattern,
            ops::AttentionPattern::S2(
                {.block_size = 32, .local_blocks = 5, .stride_blocks = 4, .dense_heads = 1}));
}

// One case of every kind of the grammar.
const std::vector<std::string>& OneOfEachKind() {
  static const std::vector<std::string> names = {
      "full_bf16_T8192_Hq8_Hkv4_D64",
      "causal_bf16_T8192_Hq8_Hkv4_D64",
      "window_bf16_T8192_Hq8_Hkv4_D64_W1024_S64",
      "bwindow_bf16_T8192_Hq8_Hkv4_D64_W1024_S64",
      "s2_bf16_T8192_Hq8_Hkv4_D64_B64_L16_V4_N1",
      "s2same_bf16_T8192_Hq8_Hkv4_D64_B64_L16_V8",
      "global_bf16_T8192_Hq8_Hkv4_D64_W1024_S64",
      "bglobal_bf16_T8192_Hq8_Hkv4_D64_W1024_S64",
      "power_bf16_T8192_Hq8_Hkv4_D64_B64_L5",
      "dilated_bf16_T8192_Hq8_Hkv4_D64_B64_L4_V4",
      "bdilated_bf16_T8192_Hq8_Hkv4_D64_B64_L4_V4",
      "prefix_bf16_T8192_Hq8_Hkv4_D64_S256",
      "sharedquestion_bf16_T8192_Hq8_Hkv4_D64_Q512_A256",
      "causalblockwise_bf16_T8192_Hq8_Hkv4_D64_A512",
      "blockcausal_bf16_T8192_Hq8_Hkv4_D64_B128",
      "random_bf16_T8192_Hq8_Hkv4_D64_B64_R10",
      "brandom_bf16_T8192_Hq8_Hkv4_D64_B64_R100_M4_I2_E7_H1",
      "spans_bf16_T8192_Hq8_Hkv4_D64_F1_W1024_S64",
      "longgen_bf16_T8192_Hq8_Hkv4_D64",
  };
  return names;
}

TEST(BenchCasesTest, EveryKindOfPatternHasAName) {
  using ops::AttentionPattern;
  const auto pattern = [](size_t i) { return ParseAttentionCase(OneOfEachKind()[i]).pattern; };
  const std::vector<AttentionPattern> expected = {
      AttentionPattern::Full(),
      AttentionPattern::Causal(),
      AttentionPattern::Window(1024, 64),
      AttentionPattern::Window(1024, 64, true),
      AttentionPattern::S2({.local_blocks = 16, .stride_blocks = 4, .dense_heads = 1}),
      AttentionPattern::S2({.local_blocks = 16, .stride_blocks = 8, .homogeneous = true}),
      AttentionPattern::GlobalWindow(1024, 64),
      AttentionPattern::GlobalWindow(1024, 64, true),
      AttentionPattern::Power({.local_blocks = 5, .sink_blocks = 1}),
      AttentionPattern::Dilated({.neighbours = 4, .dilation = 4}),
      AttentionPattern::Dilated({.neighbours = 4, .dilation = 4, .bidirectional = true}),
      AttentionPattern::Prefix(256),
      AttentionPattern::SharedQuestion({512, 256}),
      AttentionPattern::CausalBlockwise({512}),
      AttentionPattern::BlockCausal(128),
      AttentionPattern::RandomBlocks({.density = 0.01}),
      AttentionPattern::RandomBlocks({.density = 0.1,
                                      .seed = 7,
                                      .mean_blocks = 4,
                                      .min_blocks = 2,
                                      .bidirectional = true,
                                      .per_head = true}),
      AttentionPattern::Spans({{}, {1024, 64}, {1024, 64}, {1024, 64}}),
      AttentionPattern::Window(1984, 64)};
  ASSERT_EQ(OneOfEachKind().size(), expected.size());
  std::set<ops::PatternKind> kinds;
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(pattern(i), expected[i]) << OneOfEachKind()[i] << ": " << pattern(i).ToString();
    kinds.insert(expected[i].kind);
  }
  EXPECT_EQ(kinds.size(), static_cast<size_t>(ops::PatternKind::kSpans) + 1)
      << "a kind has no name";
  const AttentionCase moba = ParseAttentionCase("moba_bf16_T8192_Hq8_Hkv4_D64_B512_K4");
  EXPECT_EQ(moba.moba, (ops::MobaOptions{.block_size = 512, .top_k = 4}));
}

TEST(BenchCasesTest, SigmoidStandsBeforeAnyPattern) {
  for (const std::string& name : OneOfEachKind()) {
    const AttentionCase softmax = ParseAttentionCase(name),
                        sigmoid = ParseAttentionCase("sigmoid_" + name);
    EXPECT_FALSE(softmax.IsSigmoid()) << name;
    EXPECT_TRUE(sigmoid.IsSigmoid()) << name;
    EXPECT_EQ(sigmoid.pattern, softmax.pattern) << name;
    EXPECT_EQ(sigmoid.dtype, softmax.dtype) << name;
    // A check of small softmax would let a wrong sigmoid pass.
    EXPECT_TRUE(SmallVersion(sigmoid).IsSigmoid()) << name;
  }
}

TEST(BenchCasesTest, SizesMayComeInAnyOrder) {
  const AttentionCase c = ParseAttentionCase("window_f32_W9_D64_Hkv4_Hq8_S3_T100");
  EXPECT_EQ(c.tokens, 100);
  EXPECT_EQ(c.heads, 8);
  EXPECT_EQ(c.kv_heads, 4);
  EXPECT_EQ(c.pattern.window, 9);
  EXPECT_EQ(c.pattern.sinks, 3);
}

TEST(BenchCasesTest, AttentionErrorsNameTheToken) {
  const auto complaint = [](const std::string& name) {
    const std::string text = Complaint(ParseAttentionCase, name);
    ExpectMentions(text, name);
    return text;
  };
  ExpectMentions(complaint("cousal_f32_T64_Hq1_Hkv1_D8"), "\"cousal\"");
  ExpectMentions(complaint("causal_f16_T64_Hq1_Hkv1_D8"), "\"f16\"");
  ExpectMentions(complaint("sigmoid_f32_T64_Hq1_Hkv1_D8"), "\"f32\" is not a pattern");
  ExpectMentions(complaint("sigmoid"), "\"\" is not a pattern");
  ExpectMentions(complaint("sigmoid_sigmoid_causal_f32_T64_Hq1_Hkv1_D8"), "\"sigmoid\"");
  ExpectMentions(complaint("sigmoid_moba_f32_T64_Hq4_Hkv4_D8_B64_K2"), "softmax only");
  ExpectMentions(complaint("causal_f32_T64_Hq1_Hkv1"), "D is missing");
  ExpectMentions(complaint("causal_f32_T64_T65_Hq1_Hkv1_D8"), "\"T65\" gives T a second time");
  ExpectMentions(complaint("causal_f32_T64_Hq1_Hkv1_D8_W9"), "\"W9\" does not belong");
  ExpectMentions(complaint("window_f32_T64_Hq1_Hkv1_D8"), "W is missing");
  ExpectMentions(complaint("causal_f32_T64x_Hq1_Hkv1_D8"), "\"T64x\"");
  ExpectMentions(complaint("causal_f32_64_Hq1_Hkv1_D8"), "\"64\"");
  ExpectMentions(complaint("causal_f32_T0_Hq1_Hkv1_D8"), "\"T0\" is less than 1");
  ExpectMentions(complaint("causal_f32_T99999999999999999999_Hq1_Hkv1_D8"), "T9999");
  ExpectMentions(complaint("causal_f32_T64_Hq3_Hkv2_D8"), "Hq3 is not a multiple of Hkv2");
  ExpectMentions(complaint("causal_f32_T64_Hq4_Hkv4_D8_G3"), "Hkv4 is not a multiple of G3");
  ExpectMentions(complaint("causal_f32_T64_Hq4_Hkv4_D8_G0"), "\"G0\" is less than 1");
  ExpectMentions(complaint("moba_f32_T64_Hq4_Hkv4_D8_B64"), "K is missing");
  ExpectMentions(complaint("moba_f32_T64_Hq4_Hkv4_D8_B65_K2"), "block_size");
  ExpectMentions(complaint("moba_f32_T64_Hq4_Hkv4_D8_B64_K2_G1"), "\"G1\" does not belong");
  ExpectMentions(complaint("causal_f32_T64_Hq2_Hkv2_D8_"), "\"\"");
  // The pattern's own rules: 8 residues and only 4 heads that see one each; a block that is no
  // power of two.
  ExpectMentions(complaint("s2_f32_T64_Hq4_Hkv4_D8_B64_L1_V8"), "s2.stride_blocks");
  ExpectMentions(complaint("s2_f32_T64_Hq4_Hkv4_D8_B48_L1_V4"), "s2.block_size");
}

TEST(BenchCasesTest, ReadsEveryGemmRole) {
  const GemmCase plain = ParseGemmCase("gemm_bf16_M1024_N512_K256");
  EXPECT_EQ(plain.dtype, DType::kBF16);
  EXPECT_EQ(plain.role, GemmRole::kPlain);
  EXPECT_EQ(plain.m, 1024);
  EXPECT_EQ(plain.n, 512);
  EXPECT_EQ(plain.k, 256);
  EXPECT_EQ(ParseGemmCase("gemm_f32_forward_M1_N2_K3").role, GemmRole::kForward);
  EXPECT_EQ(ParseGemmCase("gemm_f32_dx_M1_N2_K3").role, GemmRole::kDx);
  EXPECT_EQ(ParseGemmCase("gemm_f32_dw_M1_N2_K3").role, GemmRole::kDw);
  ExpectMentions(Complaint(ParseGemmCase, "gemv_f32_M1_N2_K3"), "\"gemv\"");
  ExpectMentions(Complaint(ParseGemmCase, "gemm_i8_M1_N2_K3"), "\"i8\"");
  ExpectMentions(Complaint(ParseGemmCase, "gemm_f32_backward_M1_N2_K3"), "\"backward\"");
  ExpectMentions(Complaint(ParseGemmCase, "gemm_f32_M1_K3"), "N is missing");
}

TEST(BenchCasesTest, ListsSkipCommentsAndBlankLines) {
  EXPECT_EQ(ReadProblemList("# head\n\n  a_b \t\r\nc # d\n#e\nf"),
            (std::vector<std::string>{"a_b", "c", "f"}));
  EXPECT_TRUE(ReadProblemList("").empty());
  EXPECT_TRUE(ReadProblemList("# only this").empty());
}

TEST(BenchCasesTest, EveryBuiltInCaseParses) {
  for (const char* list : {"attention_default", "attention_long"}) {
    const auto names = ReadProblemList(BuiltInProblems(list));
    EXPECT_GE(names.size(), 5u) << list;
    for (const std::string& name : names) EXPECT_NO_THROW(ParseAttentionCase(name)) << name;
  }
  for (const char* list : {"gemm_default", "gemm_long"}) {
    const auto names = ReadProblemList(BuiltInProblems(list));
    EXPECT_GE(names.size(), 5u) << list;
    for (const std::string& name : names) EXPECT_NO_THROW(ParseGemmCase(name)) << name;
  }
  EXPECT_THROW(BuiltInProblems("attention"), InvalidArgument);
}

// A check on a small version proves nothing about blocks that the small version does not have.
void CheckSmallVersion(const std::string& name) {
  SCOPED_TRACE(name);
  const AttentionCase c = SmallVersion(ParseAttentionCase(name));
  EXPECT_LT(c.tokens, 800);
  EXPECT_NE(c.tokens % 64, 0);
  if (c.document_tokens > 0) {
    EXPECT_LT(c.document_tokens, c.tokens / 2);
  }
  if (c.moba.has_value()) {
    EXPECT_LT(c.moba->block_size * c.moba->top_k, c.tokens);
    return;
  }
  EXPECT_TRUE(c.pattern.Problems(c.kv_heads).empty());
  const auto mask = WholeRowMask(c.pattern, c.kv_heads, c.tokens);
  const std::string picture = mask->Ascii(c.kv_heads - 1);
  const auto has = [&](char cell) { return picture.find(cell) != std::string::npos; };
  EXPECT_TRUE(has('#')) << picture;
  using ops::PatternKind;
  const PatternKind kind = c.pattern.kind;
  const auto is = [kind](std::initializer_list<PatternKind> kinds) {
    return std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
  };
  if (kind != PatternKind::kFull) {
    EXPECT_TRUE(has('.')) << picture;
  }
  const bool whole_blocks =
      is({PatternKind::kFull, PatternKind::kBlockCausal}) ||
      (c.pattern.LooksAhead() && is({PatternKind::kDilated, PatternKind::kRandomBlocks}));
  EXPECT_NE(has('+'), whole_blocks) << picture;
  // Of the patterns that leave something out; a prefix adds to causal attention.
  if (!is({PatternKind::kFull, PatternKind::kCausal, PatternKind::kBlockCausal,
           PatternKind::kPrefix})) {
    EXPECT_LT(FactsOf(*mask).block_fraction, 0.95) << picture;
  }
}

TEST(BenchCasesTest, SmallVersionsKeepTheKindsOfBlocks) {
  for (const char* list : {"attention_default", "attention_long"}) {
    for (const std::string& name : ReadProblemList(BuiltInProblems(list))) CheckSmallVersion(name);
  }
  for (const std::string& name : OneOfEachKind()) CheckSmallVersion(name);
  // Right of the sinks' column a window must have whole blocks of its own, in the last row of 64
  // queries.
  const AttentionCase window = SmallVersion(ParseAttentionCase(OneOfEachKind()[2]));
  const std::string picture = WholeRowMask(window.pattern, 4, window.tokens)->Ascii(3);
  const size_t width = picture.find('\n') + 1;
  const std::string row = picture.substr(picture.size() - 2 * width, width);
  EXPECT_NE(row.find('#', 2), std::string::npos) << picture;
}

TEST(BenchCasesTest, SmallVersionNeverGrows) {
  const AttentionCase c = SmallVersion(ParseAttentionCase("s2_f32_T70_Hq2_Hkv2_D8_B16_L1_V2_P3"));
  EXPECT_EQ(c.tokens, 70);
  EXPECT_EQ(c.pattern.s2.block_size, 16);
  EXPECT_EQ(c.document_tokens, 3);
  const GemmCase g = SmallVersion(ParseGemmCase("gemm_f32_M3_N2_K5000"));
  EXPECT_EQ(g.m, 3);
  EXPECT_EQ(g.n, 2);
  EXPECT_LT(g.k, 500);
}

TEST(BenchCasesTest, MemoryCases) {
  const MemoryCase rope = ParseMemoryCase("rope_bf16_T67_D16_H3");
  EXPECT_EQ(rope.op, MemoryOp::kRope);
  EXPECT_EQ(rope.dtype, DType::kBF16);
  EXPECT_EQ((std::vector<int64_t>{rope.tokens, rope.heads, rope.width}),
            (std::vector<int64_t>{67, 3, 16}));
  const MemoryCase adamw = ParseMemoryCase("adamw_f32_N1000");
  EXPECT_EQ(adamw.parameters, 1000);
  for (const char* list : {"memory_default", "memory_gpu"}) {
    EXPECT_GE(ReadProblemList(BuiltInProblems(list)).size(), 9u);
    for (const std::string& name : ReadProblemList(BuiltInProblems(list))) ParseMemoryCase(name);
  }
  for (const std::string& name : ReadProblemList(BuiltInProblems("gemm_gpu"))) ParseGemmCase(name);
  for (const std::string& name : ReadProblemList(BuiltInProblems("attention_gpu"))) {
    ParseAttentionCase(name);
  }
  for (const char* wrong :
       {"sort_f32_T4", "rmsnorm_f64_T4_D4", "rmsnorm_f32_T4", "rmsnorm_f32_T4_D4_H2",
        "rope_f32_T4_H2_D5", "adamw_f32_T4", "embedding_f32_T4_D4", "add_f32_T0_D4"}) {
    EXPECT_THROW(ParseMemoryCase(wrong), InvalidArgument) << wrong;
  }
}

}  // namespace
}  // namespace longspan::launch
