#include "launch/bench/cases.h"

#include <algorithm>
#include <map>

#include "launch/bench/case_name.h"
#include "launch/bench/pattern_cases.h"
#include "ops/core/error.h"

namespace longspan::launch {
namespace {

constexpr const char* kAttentionForm =
    "PATTERN_DTYPE_T4096_Hq8_Hkv2_D64, with W1024_S64 for window, B64_L4_V4 for s2 and B512_K4 for "
    "moba (the others: launch/bench/pattern_cases.h), and sigmoid_ before it for sigmoid attention";
constexpr const char* kGemmForm =
    "gemm_DTYPE_M1024_N1024_K1024, with forward, dx or dw after the dtype for a linear layer";

constexpr const char* kMemoryForm =
    "rmsnorm, swiglu, gelu, cast or add_DTYPE_T4096_D1024, rope_DTYPE_T4096_H8_D64, "
    "adamw_DTYPE_N1000000, "
    "crossentropy_DTYPE_T1024_V32000 or embedding_DTYPE_T4096_V32000_D1024";

}  // namespace

ops::Documents AttentionCase::Documents() const {
  if (document_tokens == 0) return ops::Documents::OnePerRow(1, tokens);
  std::vector<int64_t> ends;
  for (int64_t end = document_tokens; end < tokens; end += document_tokens) ends.push_back(end);
  ends.push_back(tokens);
  return ops::Documents::FromEnds(tokens, {ends});
}

AttentionCase ParseAttentionCase(const std::string& name) {
  CaseName tokens(name, kAttentionForm);
  AttentionCase c;
  c.name = name;
  std::string kind = tokens.Word();
  if (kind == "sigmoid") {
    c.normalization = ops::Normalization::kSigmoid;
    kind = tokens.Word();
    if (kind == "moba") tokens.Fail("moba is built for softmax only");
  }
  if (!IsPatternKind(kind) && kind != "moba") {
    tokens.Fail(Str("\"", kind, "\" is not a pattern; use moba or ", kPatternKinds));
  }
  c.dtype = tokens.ReadDType();
  tokens.ReadSizes();
  c.tokens = tokens.Take("T", 1);
  c.heads = tokens.Take("Hq", 1);
  c.kv_heads = tokens.Take("Hkv", 1);
  c.head_dim = tokens.Take("D", 1);
  c.document_tokens = tokens.Take("P", 1, 0);
  if (kind == "moba") {
    c.moba = {.block_size = tokens.Take("B", 1), .top_k = tokens.Take("K", 1)};
  } else {
    c.timed_kv_heads = tokens.Take("G", 1, 0);
    c.pattern = ReadPattern(kind, c.kv_heads, tokens);
  }
  tokens.Finish();
  if (c.heads % c.kv_heads != 0) {
    tokens.Fail(Str("Hq", c.heads, " is not a multiple of Hkv", c.kv_heads));
  }
  const std::vector<std::string> problems =
      c.moba.has_value() ? c.moba->Problems() : c.pattern.Problems(c.kv_heads);
  if (!problems.empty()) tokens.Fail(problems.front());
  if (c.timed_kv_heads > 0 && c.kv_heads % c.timed_kv_heads != 0) {
    tokens.Fail(Str("Hkv", c.kv_heads, " is not a multiple of G", c.timed_kv_heads));
  }
  return c;
}

GemmCase ParseGemmCase(const std::string& name) {
  CaseName tokens(name, kGemmForm);
  GemmCase c{.name = name};
  const std::string kind = tokens.Word();
  if (kind != "gemm") tokens.Fail(Str("\"", kind, "\" is not gemm"));
  c.dtype = tokens.ReadDType();
  const std::map<std::string, GemmRole> roles = {
      {"forward", GemmRole::kForward}, {"dx", GemmRole::kDx}, {"dw", GemmRole::kDw}};
  const auto role = roles.find(tokens.Peek());
  if (role != roles.end()) {
    c.role = role->second;
    tokens.Word();
  }
  tokens.ReadSizes();
  c.m = tokens.Take("M", 1);
  c.n = tokens.Take("N", 1);
  c.k = tokens.Take("K", 1);
  tokens.Finish();
  return c;
}

MemoryCase ParseMemoryCase(const std::string& name) {
  CaseName tokens(name, kMemoryForm);
  MemoryCase c{.name = name};
  const std::string kind = tokens.Word();
  const std::map<std::string, MemoryOp> ops = {
      {"rmsnorm", MemoryOp::kRmsNorm},
      {"swiglu", MemoryOp::kSwiGlu},
      {"gelu", MemoryOp::kGelu},
      {"cast", MemoryOp::kCast},
      {"add", MemoryOp::kAdd},
      {"rope", MemoryOp::kRope},
      {"adamw", MemoryOp::kAdamW},
      {"crossentropy", MemoryOp::kCrossEntropy},
      {"embedding", MemoryOp::kEmbedding},
  };
  const auto op = ops.find(kind);
  if (op == ops.end()) tokens.Fail(Str("\"", kind, "\" is not an op that is timed by its bytes"));
  c.op = op->second;
  c.dtype = tokens.ReadDType();
  if (c.dtype == DType::kF64) tokens.Fail("f64 is not timed; use f32 or bf16");
  tokens.ReadSizes();
  if (c.op == MemoryOp::kAdamW) {
    c.parameters = tokens.Take("N", 1);
  } else {
    c.tokens = tokens.Take("T", 1);
  }
  const bool vocab = c.op == MemoryOp::kCrossEntropy || c.op == MemoryOp::kEmbedding;
  if (vocab) c.vocab = tokens.Take("V", 1);
  if (c.op == MemoryOp::kRope) c.heads = tokens.Take("H", 1);
  if (c.op != MemoryOp::kAdamW && c.op != MemoryOp::kCrossEntropy) c.width = tokens.Take("D", 1);
  tokens.Finish();
  if (c.op == MemoryOp::kRope && c.width % 2 != 0) tokens.Fail(Str("D", c.width, " is odd"));
  return c;
}

std::vector<std::string> ReadProblemList(std::string_view text) {
  constexpr std::string_view kBlank = " \t\r";
  std::vector<std::string> names;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    line = line.substr(0, line.find('#'));
    const size_t first = line.find_first_not_of(kBlank);
    if (first == std::string_view::npos) continue;
    names.emplace_back(line.substr(first, line.find_last_not_of(kBlank) - first + 1));
  }
  return names;
}

AttentionCase SmallVersion(const AttentionCase& problem) {
  AttentionCase c = problem;
  auto [pattern, tokens] = SmallVersion(problem.pattern);
  c.pattern = std::move(pattern);
  if (c.moba.has_value()) {
    c.moba->block_size = 64;
    c.moba->top_k = std::min<int64_t>(c.moba->top_k, 4);
    tokens = 64 * (c.moba->top_k + 4) + 11;  // more blocks than are chosen
  }
  c.timed_kv_heads = 0;
  c.tokens = std::min(c.tokens, tokens);
  if (c.document_tokens > 0) {
    c.document_tokens = std::min(c.document_tokens, std::max<int64_t>(1, c.tokens * 2 / 5));
  }
  return c;
}

GemmCase SmallVersion(const GemmCase& problem) {
  GemmCase c = problem;
  c.m = std::min<int64_t>(c.m, 97);
  c.n = std::min<int64_t>(c.n, 131);
  c.k = std::min<int64_t>(c.k, 203);
  return c;
}

MemoryCase SmallVersion(const MemoryCase& problem) {
  MemoryCase c = problem;
  c.tokens = std::min<int64_t>(c.tokens, 131);
  c.heads = std::min<int64_t>(c.heads, 3);
  c.vocab = std::min<int64_t>(c.vocab, 203);
  c.parameters = std::min<int64_t>(c.parameters, 1003);
  return c;
}

}  // namespace longspan::launch
