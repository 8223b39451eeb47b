#include "ops/attention/attention.h"

#include <cmath>

#include "ops/attention/cpu/attention_cpu.h"

namespace longspan::ops {
namespace {

using cpu::BackwardArgs;
using cpu::ForwardArgs;

// ---- implementation table --------------------------------------------------------------------

std::string BlockedRejects(const AttentionProblem& problem) {
  if (problem.dtype == DType::kF64) return "it computes in f32 and the problem is f64";
  if (problem.head_dim > cpu::kMaxBlockedHeadDim) {
    return Str("head_dim ", problem.head_dim, " is above ", cpu::kMaxBlockedHeadDim);
  }
  return "";
}

std::string Avx512Rejects(const AttentionProblem& problem) {
#if defined(LONGSPAN_HAVE_AVX512)
  static const bool supported = __builtin_cpu_supports("avx512f") &&
                                __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  if (!supported) return "this processor has no AVX-512 (F, BW, VL, DQ)";
  if (problem.head_dim % 8 != 0) {
    return Str("head_dim ", problem.head_dim, " is not a multiple of 8");
  }
  return BlockedRejects(problem);
#else
  static_cast<void>(problem);
  return "this build is not for x86-64";
#endif
}

std::string ReferenceRejects(const AttentionProblem&) { return ""; }

struct Implementation {
  AttentionImplementation info;
  void (*forward)(Context&, const ForwardArgs&);
  void (*backward)(Context&, const BackwardArgs&);
};

#if defined(LONGSPAN_HAVE_AVX512)
void Avx512Forward(Context& ctx, const ForwardArgs& args) {
  cpu::BlockedForward(ctx, avx512::kBlockKernels, args);
}
void Avx512Backward(Context& ctx, const BackwardArgs& args) {
  cpu::BlockedBackward(ctx, avx512::kBlockKernels, args);
}
#else
constexpr void (*Avx512Forward)(Context&, const ForwardArgs&) = nullptr;
constexpr void (*Avx512Backward)(Context&, const BackwardArgs&) = nullptr;
#endif
void PortableForward(Context& ctx, const ForwardArgs& args) {
  cpu::BlockedForward(ctx, portable::kBlockKernels, args);
}
void PortableBackward(Context& ctx, const BackwardArgs& args) {
  cpu::BlockedBackward(ctx, portable::kBlockKernels, args);
}

constexpr Implementation kTable[] = {
    {{"avx512", Avx512Rejects}, Avx512Forward, Avx512Backward},
    {{"portable", BlockedRejects}, PortableForward, PortableBackward},
    {{"reference", ReferenceRejects}, cpu::ReferenceForward, cpu::ReferenceBackward},
};

const Implementation& Choose(const char* op, const AttentionOptions& options,
                             const AttentionProblem& problem) {
  std::string names;
  for (const Implementation& entry : kTable) {
    names += (names.empty() ? "" : ", ") + std::string(entry.info.name);
    if (!options.implementation.empty() && options.implementation != entry.info.name) continue;
    const std::string reason = entry.info.rejects(problem);
    if (reason.empty()) return entry;
    if (!options.implementation.empty()) {
      throw InvalidArgument(
          Str(op, ": implementation ", options.implementation, " cannot run this: ", reason));
    }
  }
  throw InvalidArgument(
      Str(op, ": implementation ", options.implementation, " does not exist; use one of ", names));
}

// ---- validation ------------------------------------------------------------------------------

void Require(bool holds, const char* op, const std::string& what) {
  if (!holds) throw InvalidArgument(Str(op, ": ", what));
}

void RequireTensor(const char* op, const char* name, const Tensor& t, Shape shape, DType dtype,
                   DType other) {
  const std::string dtypes =
      dtype == other ? ToString(dtype) : Str(ToString(dtype), " or ", ToString(other));
  Require(t.defined() && t.shape() == shape && (t.dtype() == dtype || t.dtype() == other), op,
          Str(name, " is ", t.defined() ? t.Describe() : "undefined", " but must be ", dtypes,
              shape.ToString()));
}

// Every block of the mask must lie inside the storage that the table points to.
void RequireBlocks(const char* op, const char* name, const BlockMask& mask, int64_t first_block,
                   int64_t blocks, const std::vector<int64_t>& offsets, int64_t token_stride,
                   int64_t head_dim, int64_t numel) {
  const int64_t heads = mask.kv_heads(), length = mask.documents().row_length;
  Require(static_cast<int64_t>(offsets.size()) == heads * blocks, op,
          Str(name, ".offsets has ", offsets.size(),
              " entries but must have kv heads x blocks = ", heads * blocks));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t j = 0; j < mask.keys().size(); ++j) {
      if (mask.column_runs().Row(mask.pattern_of(h), j).empty()) continue;
      const int32_t id = mask.keys().ids[static_cast<size_t>(j)];
      const int64_t at = id - first_block;
      const int64_t offset =
          at < 0 || at >= blocks ? -1 : offsets[static_cast<size_t>(h * blocks + at)];
      Require(offset >= 0, op,
              Str(name, " lacks block ", id, " of kv head ", h, ", which the mask needs"));
      const int64_t end = offset + (BlockTokens(length, id) - 1) * token_stride + head_dim;
      Require(end <= numel, op,
              Str(name, ": block ", id, " of kv head ", h, " ends at element ", end,
                  " but the storage has ", numel));
    }
  }
}

struct Sizes {
  int64_t tokens, heads, dim;
  double scale;
};

Sizes RequireInputs(const char* op, const Tensor& q, const KvView& kv, const BlockMask& mask,
                    const AttentionOptions& options) {
  Require(q.defined() && q.rank() == 3 && IsFloat(q.dtype()), op,
          Str("q is ", q.defined() ? q.Describe() : "undefined",
              " but must be f32, bf16 or f64 [Tq, Hq, D]"));
  const int64_t tokens = mask.queries().tokens();
  Require(q.dim(0) == tokens, op,
          Str("q is ", q.Describe(), " but mask.queries() has ", tokens, " tokens"));
  Require(q.dim(2) >= 1 && q.dim(2) == kv.head_dim, op,
          Str("q is ", q.Describe(), " but kv.head_dim is ", kv.head_dim));
  Require(kv.kv_heads == mask.kv_heads(), op,
          Str("kv has ", kv.kv_heads, " kv heads but the mask has ", mask.kv_heads()));
  Require(
      q.dim(1) >= 1 && q.dim(1) % kv.kv_heads == 0, op,
      Str("q has ", q.dim(1), " heads, which is not a multiple of the ", kv.kv_heads, " kv heads"));
  if (!mask.empty()) {
    Require(
        kv.k.defined() && kv.v.defined() && kv.k.dtype() == q.dtype() && kv.v.dtype() == q.dtype(),
        op, Str("kv.k and kv.v must have the dtype of q, ", ToString(q.dtype())));
    Require(kv.token_stride >= kv.head_dim, op,
            Str("kv.token_stride is ", kv.token_stride, " but head_dim is ", kv.head_dim));
    RequireBlocks(op, "kv", mask, kv.first_block, kv.blocks, kv.offsets, kv.token_stride,
                  kv.head_dim, std::min(kv.k.numel(), kv.v.numel()));
  }
  Require(std::isfinite(options.scale), op, Str("options.scale is ", options.scale));
  const double scale =
      options.scale != 0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(q.dim(2)));
  return {tokens, q.dim(1), q.dim(2), scale};
}

AttentionProblem ProblemOf(const Tensor& q, const KvView& kv) {
  return {.dtype = q.dtype(), .heads = q.dim(1), .kv_heads = kv.kv_heads, .head_dim = q.dim(2)};
}

}  // namespace

const std::vector<AttentionImplementation>& AttentionImplementations() {
  static const std::vector<AttentionImplementation> table = [] {
    std::vector<AttentionImplementation> entries;
    for (const Implementation& entry : kTable) entries.push_back(entry.info);
    return entries;
  }();
  return table;
}

AttentionResult AttentionForward(Context& ctx, const Tensor& q, const KvView& kv,
                                 const BlockMask& mask, const AttentionOptions& options) {
  constexpr const char* kOp = "AttentionForward";
  const Sizes sizes = RequireInputs(kOp, q, kv, mask, options);
  const Implementation& chosen = Choose(kOp, options, ProblemOf(q, kv));
  const TraceScope trace(ctx.trace(), "attention");
  const DType wide = AccumulatorOf(q.dtype());
  AttentionResult result{.o = ctx.Empty(q.shape(), options.round_output ? q.dtype() : wide),
                         .lse = ctx.Empty({sizes.tokens, sizes.heads}, wide),
                         .implementation = chosen.info.name};
  chosen.forward(
      ctx,
      {.q = q, .kv = kv, .mask = mask, .scale = sizes.scale, .o = result.o, .lse = result.lse});
  return result;
}

void AttentionBackward(Context& ctx, const Tensor& d_out, const Tensor& q, const KvView& kv,
                       const Tensor& lse, const Tensor& delta, const BlockMask& mask, Tensor& dq,
                       const KvGradView& dkv, const AttentionOptions& options, const Tensor& dlse) {
  constexpr const char* kOp = "AttentionBackward";
  const Sizes sizes = RequireInputs(kOp, q, kv, mask, options);
  const DType wide = AccumulatorOf(q.dtype());
  const Shape rows{sizes.tokens, sizes.heads};
  RequireTensor(kOp, "d_out", d_out, q.shape(), wide, q.dtype());
  RequireTensor(kOp, "lse", lse, rows, wide, wide);
  RequireTensor(kOp, "delta", delta, rows, wide, wide);
  if (dlse.defined()) RequireTensor(kOp, "dlse", dlse, rows, wide, wide);
  RequireTensor(kOp, "dq", dq, q.shape(), wide, wide);
  if (!mask.empty()) {
    Require(
        dkv.dk.defined() && dkv.dv.defined() && dkv.dk.dtype() == wide && dkv.dv.dtype() == wide,
        kOp, Str("dkv.dk and dkv.dv must be ", ToString(wide)));
    Require(dkv.token_stride >= kv.head_dim, kOp,
            Str("dkv.token_stride is ", dkv.token_stride, " but head_dim is ", kv.head_dim));
    RequireBlocks(kOp, "dkv", mask, dkv.first_block, dkv.blocks, dkv.offsets, dkv.token_stride,
                  kv.head_dim, std::min(dkv.dk.numel(), dkv.dv.numel()));
  }
  const Implementation& chosen = Choose(kOp, options, ProblemOf(q, kv));
  const TraceScope trace(ctx.trace(), "attention");
  chosen.backward(ctx, {.d_out = d_out,
                        .q = q,
                        .kv = kv,
                        .lse = lse,
                        .delta = delta,
                        .dlse = dlse,
                        .mask = mask,
                        .scale = sizes.scale,
                        .dq = dq,
                        .dkv = dkv});
}

}  // namespace longspan::ops
