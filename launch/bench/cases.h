#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/attention/documents.h"
#include "ops/attention/moba.h"
#include "ops/attention/pattern.h"
#include "ops/core/dtype.h"

namespace longspan::launch {

// Benchmark problems are named by tokens joined with '_': a kind, a dtype (f32, bf16, f64), then
// one token of letters and a number for each size, in any order.
//
// Attention   PATTERN_DTYPE_T4096_Hq8_Hkv2_D64[_...]: one row of T tokens, Hq query heads, Hkv kv
//             heads, D elements per head
//   PATTERN            causal, window with W1024_S64, s2 with B64_L4_V4, ...: pattern_cases.h
//   moba               B512 tokens per block, K4 blocks for each token and head, its own included
//   sigmoid_PATTERN    sigmoid in place of softmax, with the bias -log T; not of moba
//   P512               cuts the row into documents of 512 tokens (the last may be shorter)
//   G1                 runs only so many kv heads with their query heads and multiplies the time:
//                      for rows that would take minutes, of patterns that are the same for all
//                      heads; not of moba
struct AttentionCase {
  std::string name;
  DType dtype = DType::kF32;
  ops::AttentionPattern pattern;  // not of moba
  std::optional<ops::MobaOptions> moba;
  ops::Normalization normalization = ops::Normalization::kSoftmax;
  int64_t tokens = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int64_t document_tokens = 0;  // 0: the row is one document
  int64_t timed_kv_heads = 0;   // 0: all

  ops::Documents Documents() const;
  bool IsSigmoid() const { return normalization == ops::Normalization::kSigmoid; }
};

// Gemm        gemm_DTYPE[_ROLE]_M1024_N512_K256: op(A) [M, K] times op(B) [K, N]
//   no role     A and B as they are
//   forward     of a linear layer: B is stored transposed; result in the operands' dtype
//   dx          its input gradient: A and B as they are; result in the operands' dtype
//   dw          its weight gradient: A is stored transposed; added to a result in f32 (f64)
enum class GemmRole { kPlain, kForward, kDx, kDw };
struct GemmCase {
  std::string name;
  DType dtype = DType::kF32;
  GemmRole role = GemmRole::kPlain;
  int64_t m = 0, n = 0, k = 0;
};

// Memory      OP_DTYPE_sizes: an op whose time is that of moving its operands
//   rmsnorm       T rows of D
//   swiglu, add   T rows of D: gate, up and result; two operands and their sum
//   gelu, cast    T rows of D; cast from f32 to bf16 for bf16, the other way for f32
//   rope          T tokens of H heads of D
//   adamw         N parameters; state in f32, bf16: with a copy in bf16
//   crossentropy  logits of T tokens over V words; the product that makes them is not counted
//   embedding     T tokens, a table of V rows of D
enum class MemoryOp {
  kRmsNorm,
  kSwiGlu,
  kGelu,
  kCast,
  kAdd,
  kRope,
  kAdamW,
  kCrossEntropy,
  kEmbedding
};
struct MemoryCase {
  std::string name;
  DType dtype = DType::kF32;
  MemoryOp op = MemoryOp::kAdd;
  int64_t tokens = 0, width = 0, heads = 0, vocab = 0, parameters = 0;
};

// Errors    InvalidArgument naming the case and the token that is wrong, missing or given twice, or
//           the problem of the pattern
AttentionCase ParseAttentionCase(const std::string& name);
GemmCase ParseGemmCase(const std::string& name);
MemoryCase ParseMemoryCase(const std::string& name);

// The names of a problem list: one a line; blank lines and what follows '#' are left out.
std::vector<std::string> ReadProblemList(std::string_view text);

// The text of a list that is part of the program: "attention_default", "attention_gpu" and
// "attention_long", the same for gemm, "memory_default" and "memory_gpu" (files of
// tests/bench/problems); also the configuration "llama_1b_32k" (configs/presets).
std::string_view BuiltInProblems(std::string_view name);

// A problem of the same kind that is small enough for the reference implementation, with odd sizes,
// and still has hidden, partly visible and fully visible blocks where the pattern has them.
AttentionCase SmallVersion(const AttentionCase& problem);
GemmCase SmallVersion(const GemmCase& problem);
MemoryCase SmallVersion(const MemoryCase& problem);

}  // namespace longspan::launch
