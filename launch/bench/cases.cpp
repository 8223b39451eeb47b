#include "launch/bench/cases.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>

#include "ops/core/error.h"

namespace longspan::launch {
namespace {

constexpr int64_t kLargest = int64_t{1} << 30;

// The tokens of one name, taken one by one; Finish complains about those nobody asked for.
class CaseName {
 public:
  CaseName(const std::string& name, std::string_view form) : name_(name), form_(form) {
    std::string_view rest = name;
    for (;;) {
      const size_t end = rest.find('_');
      words_.emplace_back(rest.substr(0, end));
      if (end == std::string_view::npos) break;
      rest.remove_prefix(end + 1);
    }
  }

  [[noreturn]] void Fail(const std::string& problem) const {
    throw InvalidArgument(
        Str("benchmark case \"", name_, "\": ", problem, "; the form is ", form_));
  }

  // The next word, which is not a size; empty when there is none.
  std::string Word() {
    if (words_.empty()) return "";
    std::string word = words_.front();
    words_.erase(words_.begin());
    return word;
  }
  const std::string& Peek() const { return words_.empty() ? kNothing : words_.front(); }

  DType ReadDType() {
    const std::string word = Word();
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
      if (word == ToString(dtype)) return dtype;
    }
    Fail(Str("\"", word, "\" is not a dtype; use f32, bf16 or f64"));
  }

  // All remaining words are sizes: letters, then a number.
  void ReadSizes() {
    for (const std::string& word : words_) {
      const size_t digits = word.find_first_of("0123456789");
      int64_t value = 0;
      const char* const end = word.data() + word.size();
      const bool has_both = digits != std::string::npos && digits > 0;
      if (!has_both || std::from_chars(word.data() + digits, end, value).ptr != end ||
          value > kLargest) {
        Fail(Str("\"", word, "\" is not a size such as T4096"));
      }
      if (!sizes_.emplace(word.substr(0, digits), value).second) {
        Fail(Str("\"", word, "\" gives ", word.substr(0, digits), " a second time"));
      }
    }
  }

  int64_t Take(const std::string& letters, int64_t smallest,
               std::optional<int64_t> otherwise = {}) {
    const auto it = sizes_.find(letters);
    if (it == sizes_.end()) {
      if (otherwise.has_value()) return *otherwise;
      Fail(Str(letters, " is missing"));
    }
    const int64_t value = it->second;
    sizes_.erase(it);
    if (value < smallest) Fail(Str("\"", letters, value, "\" is less than ", smallest));
    return value;
  }

  void Finish() const {
    if (sizes_.empty()) return;
    const auto& [letters, value] = *sizes_.begin();
    Fail(Str("\"", letters, value, "\" does not belong to this kind of case"));
  }

 private:
  static inline const std::string kNothing;
  const std::string name_, form_;
  std::vector<std::string> words_;
  std::map<std::string, int64_t> sizes_;
};

constexpr const char* kAttentionForm =
    "PATTERN_DTYPE_T4096_Hq8_Hkv2_D64, with W1024_S64 for window and B64_L4_V4 for s2";
constexpr const char* kGemmForm =
    "gemm_DTYPE_M1024_N1024_K1024, with forward, dx or dw after the dtype for a linear layer";

constexpr const char* kMemoryForm =
    "rmsnorm, swiglu or add_DTYPE_T4096_D1024, rope_DTYPE_T4096_H8_D64, adamw_DTYPE_N1000000, "
    "crossentropy_DTYPE_T1024_V32000 or embedding_DTYPE_T4096_V32000_D1024";

ops::AttentionPattern ReadPattern(const std::string& kind, CaseName& name) {
  if (kind == "full") return ops::AttentionPattern::Full();
  if (kind == "causal") return ops::AttentionPattern::Causal();
  if (kind == "window")
    return ops::AttentionPattern::Window(name.Take("W", 1), name.Take("S", 0, 0));
  ops::S2Options s2;
  s2.block_size = name.Take("B", 1);
  s2.local_blocks = name.Take("L", 1);
  s2.stride_blocks = name.Take("V", 1);
  s2.dense_heads = name.Take("N", 0, 0);
  return ops::AttentionPattern::S2(s2);
}

}  // namespace

AttentionCase ParseAttentionCase(const std::string& name) {
  CaseName tokens(name, kAttentionForm);
  AttentionCase c{.name = name};
  const std::string kind = tokens.Word();
  if (kind != "full" && kind != "causal" && kind != "window" && kind != "s2") {
    tokens.Fail(Str("\"", kind, "\" is not a pattern; use full, causal, window or s2"));
  }
  c.dtype = tokens.ReadDType();
  tokens.ReadSizes();
  c.tokens = tokens.Take("T", 1);
  c.heads = tokens.Take("Hq", 1);
  c.kv_heads = tokens.Take("Hkv", 1);
  c.head_dim = tokens.Take("D", 1);
  c.document_tokens = tokens.Take("P", 1, 0);
  c.pattern = ReadPattern(kind, tokens);
  tokens.Finish();
  if (c.heads % c.kv_heads != 0) {
    tokens.Fail(Str("Hq", c.heads, " is not a multiple of Hkv", c.kv_heads));
  }
  const std::vector<std::string> problems = c.pattern.Problems(c.kv_heads);
  if (!problems.empty()) tokens.Fail(problems.front());
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
  int64_t tokens = 203;
  if (c.pattern.kind == ops::PatternKind::kWindow) {
    // A window of more than two blocks has fully visible ones.
    c.pattern.window = std::min<int64_t>(c.pattern.window, 200);
    c.pattern.sinks = std::min<int64_t>(c.pattern.sinks, 70);
    tokens = 583;
  } else if (c.pattern.kind == ops::PatternKind::kS2) {
    ops::S2Options& s2 = c.pattern.s2;
    s2.block_size = std::min<int64_t>(s2.block_size, 64);
    s2.local_blocks = std::min<int64_t>(s2.local_blocks, 2);
    // At least one period of the stride beyond the local blocks.
    tokens = s2.block_size * (s2.local_blocks + s2.stride_blocks + 2) + 11;
  }
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
