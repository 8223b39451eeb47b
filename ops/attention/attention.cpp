#include "ops/attention/attention.h"

#include <cmath>
#include <utility>

#include "ops/attention/arguments.h"
#include "ops/attention/cpu/attention_cpu.h"
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/cuda/mma_shape.h"

namespace longspan::ops {
namespace {

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

std::string Avx512Bf16Rejects(const AttentionProblem& problem) {
  if (problem.dtype != DType::kBF16) {
    return Str("it takes bf16 and the problem is ", ToString(problem.dtype));
  }
#if defined(LONGSPAN_HAVE_AVX512)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  if (!supported) return "this processor has no AVX512-BF16";
#endif
  return Avx512Rejects(problem);
}

std::string AmxRejects(const AttentionProblem& problem) {
  const std::string reason = Avx512Bf16Rejects(problem);
  if (!reason.empty()) return reason;
#if defined(LONGSPAN_HAVE_AVX512)
  if (!cpu::AmxTilesUsable()) return "this processor or its kernel offers no AMX with bf16";
#endif
  return "";
}

std::string ReferenceRejects(const AttentionProblem&) { return ""; }

std::string ReferenceCudaRejects(const AttentionProblem& problem) {
  if (problem.dtype == DType::kF64) return "it computes in f32 and the problem is f64";
  if (problem.head_dim > internal::kMaxCudaHeadDim) {
    return Str("head_dim ", problem.head_dim, " is above ", internal::kMaxCudaHeadDim);
  }
  return "";
}

std::string MmaRejects(const AttentionProblem& problem) {
  if (problem.dtype != DType::kBF16) {
    return Str("it takes bf16 and the problem is ", ToString(problem.dtype));
  }
  if (problem.head_dim % 8 != 0) {
    return Str("head_dim ", problem.head_dim, " is not a multiple of 8");
  }
  if (!problem.aligned) return "q, k, v, d_out or dq has rows that do not start at 16 bytes";
  const std::string reason = ReferenceCudaRejects(problem);
  if (!reason.empty()) return reason;
  const int64_t bytes = mma::SharedBytesFor(problem.head_dim);
  if (bytes > problem.shared_bytes) {
    return Str("head_dim ", problem.head_dim, " takes ", bytes,
               " bytes of shared memory and the GPU has ", problem.shared_bytes);
  }
  return "";
}

struct Implementation {
  AttentionImplementation info;
  void (*forward)(Context&, const ForwardArgs&);
  void (*backward)(Context&, const BackwardArgs&);
};

// As `rejects` of an entry whose kernels know nothing of block maxima.
template <std::string (*kRejects)(const AttentionProblem&)>
std::string WithoutMaxima(const AttentionProblem& problem) {
  return problem.block_maxima ? "it does not find the largest probabilities of blocks"
                              : kRejects(problem);
}

#if defined(LONGSPAN_HAVE_AVX512)
void AmxForward(Context& ctx, const ForwardArgs& args) {
  cpu::Bf16Forward(ctx, cpu::AmxKernels(), args);
}
void AmxBackward(Context& ctx, const BackwardArgs& args) {
  cpu::Bf16Backward(ctx, cpu::AmxKernels(), args);
}
void Avx512Bf16Forward(Context& ctx, const ForwardArgs& args) {
  cpu::Bf16Forward(ctx, avx512_bf16::kKernels, args);
}
void Avx512Bf16Backward(Context& ctx, const BackwardArgs& args) {
  cpu::Bf16Backward(ctx, avx512_bf16::kKernels, args);
}
void Avx512Forward(Context& ctx, const ForwardArgs& args) {
  cpu::BlockedForward(ctx, avx512::kBlockKernels, args);
}
void Avx512Backward(Context& ctx, const BackwardArgs& args) {
  cpu::BlockedBackward(ctx, avx512::kBlockKernels, args);
}
#else
using ForwardFunction = void (*)(Context&, const ForwardArgs&);
using BackwardFunction = void (*)(Context&, const BackwardArgs&);
constexpr ForwardFunction AmxForward = nullptr, Avx512Bf16Forward = nullptr,
                          Avx512Forward = nullptr;
constexpr BackwardFunction AmxBackward = nullptr, Avx512Bf16Backward = nullptr,
                           Avx512Backward = nullptr;
#endif
void PortableForward(Context& ctx, const ForwardArgs& args) {
  cpu::BlockedForward(ctx, portable::kBlockKernels, args);
}
void PortableBackward(Context& ctx, const BackwardArgs& args) {
  cpu::BlockedBackward(ctx, portable::kBlockKernels, args);
}

constexpr DeviceKind kCpu = DeviceKind::kCpu, kCuda = DeviceKind::kCuda;

constexpr Implementation kTable[] = {
    {{"amx_bf16", kCpu, WithoutMaxima<AmxRejects>}, AmxForward, AmxBackward},
    {{"avx512_bf16", kCpu, WithoutMaxima<Avx512Bf16Rejects>},
     Avx512Bf16Forward,
     Avx512Bf16Backward},
    {{"avx512", kCpu, Avx512Rejects}, Avx512Forward, Avx512Backward},
    {{"portable", kCpu, BlockedRejects}, PortableForward, PortableBackward},
    {{"reference", kCpu, ReferenceRejects}, cpu::ReferenceForward, cpu::ReferenceBackward},
    {{"mma_bf16", kCuda, WithoutMaxima<MmaRejects>}, internal::MmaForward, internal::MmaBackward},
    {{"reference_cuda", kCuda, WithoutMaxima<ReferenceCudaRejects>},
     internal::ReferenceCudaForward,
     internal::ReferenceCudaBackward},
};

std::string NamesOn(DeviceKind device) {
  std::string names;
  for (const Implementation& entry : kTable) {
    if (entry.info.device != device) continue;
    names += (names.empty() ? "" : ", ") + std::string(entry.info.name);
  }
  return names;
}

const Implementation& Forced(const char* op, const std::string& name, Device device,
                             const AttentionProblem& problem) {
  for (const Implementation& entry : kTable) {
    if (name != entry.info.name) continue;
    const std::string reason =
        entry.info.device == device.kind
            ? entry.info.rejects(problem)
            : Str("it runs on ", entry.info.device == kCpu ? "a CPU" : "a GPU",
                  " and the device is ", ToString(device), "; use one of ", NamesOn(device.kind));
    if (reason.empty()) return entry;
    throw InvalidArgument(Str(op, ": implementation ", name, " cannot run this: ", reason));
  }
  throw InvalidArgument(
      Str(op, ": implementation ", name, " does not exist; use one of ", NamesOn(device.kind)));
}

const Implementation& Choose(const char* op, const AttentionOptions& options, Device device,
                             const AttentionProblem& problem) {
  if (!options.implementation.empty()) return Forced(op, options.implementation, device, problem);
  std::string reasons;
  for (const Implementation& entry : kTable) {
    if (entry.info.device != device.kind) continue;
    const std::string reason = entry.info.rejects(problem);
    if (reason.empty()) return entry;
    reasons += Str(reasons.empty() ? "" : "; ", entry.info.name, ": ", reason);
  }
  throw Unsupported(Str(op, ": nothing on ", ToString(device), " can run this: ", reasons));
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
void RequireBlocks(const char* op, const char* name, const BlockMask& mask, const KvTable& table,
                   int64_t head_dim, int64_t numel) {
  const int64_t heads = mask.kv_heads(), length = mask.documents().row_length;
  Require(table.kv_heads() == heads, op,
          Str(name, " has ", table.kv_heads(), " kv heads but the mask has ", heads));
  Require(table.token_stride() >= head_dim, op,
          Str(name, ".token_stride is ", table.token_stride(), " but head_dim is ", head_dim));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t j = 0; j < mask.keys().size(); ++j) {
      if (mask.column_runs().Row(mask.pattern_of(h), j).empty()) continue;
      const int32_t id = mask.keys().ids[static_cast<size_t>(j)];
      const int64_t offset = table.Offset(h, id);
      Require(offset >= 0, op,
              Str(name, " lacks block ", id, " of kv head ", h, ", which the mask needs"));
      const int64_t end = offset + (BlockTokens(length, id) - 1) * table.token_stride() + head_dim;
      Require(end <= numel, op,
              Str(name, ": block ", id, " of kv head ", h, " ends at element ", end,
                  " but the storage has ", numel));
    }
  }
}

using internal::RequireDevice;

// The bias of sigmoid; 0 of softmax, which has none.
double RequireNormalization(const char* op, const AttentionOptions& options,
                            const BlockMask& mask) {
  if (options.normalization == Normalization::kSoftmax) {
    Require(!options.bias.has_value(), op,
            Str("options.bias is ", options.bias.value_or(0),
                " but options.normalization is softmax; only sigmoid has a bias"));
    return 0;
  }
  Require(!options.want_block_maxima, op,
          "options.want_block_maxima is true but options.normalization is sigmoid; only softmax "
          "finds the largest probabilities of blocks");
  const auto row_length = static_cast<double>(mask.documents().row_length);
  const double bias = options.bias.value_or(-std::log(row_length));
  Require(std::abs(bias) <= 1e30, op,
          Str("options.bias is ", bias, "; it must be between -1e30 and 1e30"));
  return bias;
}

struct Sizes {
  int64_t tokens, heads, dim;
  double scale, bias;
};

Sizes RequireInputs(const Context& ctx, const char* op, const Tensor& q, const KvView& kv,
                    const BlockMask& mask, const AttentionOptions& options) {
  Require(q.defined() && q.rank() == 3 && IsFloat(q.dtype()), op,
          Str("q is ", q.defined() ? q.Describe() : "undefined",
              " but must be f32, bf16 or f64 [Tq, Hq, D]"));
  const int64_t tokens = mask.queries().tokens();
  Require(q.dim(0) == tokens, op,
          Str("q is ", q.Describe(), " but mask.queries() has ", tokens, " tokens"));
  Require(q.dim(2) >= 1 && q.dim(2) == kv.head_dim, op,
          Str("q is ", q.Describe(), " but kv.head_dim is ", kv.head_dim));
  RequireDevice(ctx, op, "q", q);
  Require(kv.table != nullptr, op, "kv has no table");
  Require(kv.kv_heads() == mask.kv_heads(), op,
          Str("kv has ", kv.kv_heads(), " kv heads but the mask has ", mask.kv_heads()));
  Require(q.dim(1) >= 1 && q.dim(1) % kv.kv_heads() == 0, op,
          Str("q has ", q.dim(1), " heads, which is not a multiple of the ", kv.kv_heads(),
              " kv heads"));
  if (!mask.empty()) {
    Require(
        kv.k.defined() && kv.v.defined() && kv.k.dtype() == q.dtype() && kv.v.dtype() == q.dtype(),
        op, Str("kv.k and kv.v must have the dtype of q, ", ToString(q.dtype())));
    RequireDevice(ctx, op, "kv.k", kv.k);
    RequireDevice(ctx, op, "kv.v", kv.v);
    RequireBlocks(op, "kv", mask, *kv.table, kv.head_dim, std::min(kv.k.numel(), kv.v.numel()));
  }
  Require(std::isfinite(options.scale), op, Str("options.scale is ", options.scale));
  const double scale =
      options.scale != 0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(q.dim(2)));
  return {tokens, q.dim(1), q.dim(2), scale, RequireNormalization(op, options, mask)};
}

// lse, delta and dlse of a backward pass: [Tq, Hq] in `wide`, dlse if at all; of sigmoid none.
void RequireRowStatistics(const Context& ctx, const char* op, Normalization normalization,
                          const Shape& rows, DType wide, const Tensor& lse, const Tensor& delta,
                          const Tensor& dlse) {
  const std::pair<const char*, const Tensor*> statistics[] = {
      {"lse", &lse}, {"delta", &delta}, {"dlse", &dlse}};
  for (const auto& [name, t] : statistics) {
    if (normalization == Normalization::kSigmoid) {
      Require(!t->defined(), op,
              Str(name, " is ", t->defined() ? t->Describe() : "undefined",
                  " but options.normalization is sigmoid; it must be undefined"));
    } else if (t != &dlse || t->defined()) {
      RequireTensor(op, name, *t, rows, wide, wide);
      RequireDevice(ctx, op, name, *t);
    }
  }
}

bool RowsAt16(const Tensor& t, int64_t elements_apart) {
  return !t.defined() || (reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0 &&
                          elements_apart * static_cast<int64_t>(SizeOf(t.dtype())) % 16 == 0);
}

AttentionProblem ProblemOf(const Context& ctx, const Tensor& q, const KvView& kv,
                           const Tensor& d_out, const Tensor& dq) {
  const int64_t apart = kv.table->alignment();
  return {.dtype = q.dtype(),
          .heads = q.dim(1),
          .kv_heads = kv.kv_heads(),
          .head_dim = q.dim(2),
          .aligned = RowsAt16(q, q.dim(2)) && RowsAt16(d_out, q.dim(2)) && RowsAt16(dq, q.dim(2)) &&
                     RowsAt16(kv.k, apart) && RowsAt16(kv.v, apart),
          .shared_bytes = AttentionSharedBytes(ctx)};
}

}  // namespace

namespace internal {

void RequireDevice(const Context& ctx, const char* op, const char* name, const Tensor& t) {
  Require(!t.defined() || t.device() == ctx.device(), op,
          Str(name, " is on ", ToString(t.device()), " but the Context is on ",
              ToString(ctx.device())));
}

}  // namespace internal

const std::vector<AttentionImplementation>& AttentionImplementations() {
  static const std::vector<AttentionImplementation> table = [] {
    std::vector<AttentionImplementation> entries;
    for (const Implementation& entry : kTable) entries.push_back(entry.info);
    return entries;
  }();
  return table;
}

size_t AttentionBackwardScratch(const AttentionProblem& problem, const std::string& implementation,
                                const BlockMask& mask) {
  const AttentionOptions options{.implementation = implementation};
  const Implementation& chosen = Choose("AttentionBackwardScratch", options, Device{kCpu}, problem);
  const bool in_bf16 = chosen.backward == Avx512Bf16Backward || chosen.backward == AmxBackward;
  return in_bf16 ? cpu::Bf16BackwardScratch(problem.heads, problem.head_dim, mask) : 0;
}

int64_t AttentionSharedBytes(const Context& ctx) {
  return ctx.device().kind == kCuda ? internal::MmaSharedBytes(ctx)
                                    : AttentionProblem{}.shared_bytes;
}

AttentionResult AttentionForward(Context& ctx, const Tensor& q, const KvView& kv,
                                 const BlockMask& mask, const AttentionOptions& options) {
  constexpr const char* kOp = "AttentionForward";
  const Sizes sizes = RequireInputs(ctx, kOp, q, kv, mask, options);
  AttentionProblem problem = ProblemOf(ctx, q, kv, {}, {});
  problem.block_maxima = options.want_block_maxima;
  const Implementation& chosen = Choose(kOp, options, ctx.device(), problem);
  const TraceScope trace(ctx.trace(), "attention");
  const DType wide = AccumulatorOf(q.dtype());
  AttentionResult result{.o = ctx.Empty(q.shape(), options.round_output ? q.dtype() : wide),
                         .lse = {},
                         .implementation = chosen.info.name};
  if (options.normalization == Normalization::kSoftmax) {
    result.lse = ctx.Empty({sizes.tokens, sizes.heads}, wide);
  }
  if (options.want_block_maxima) {
    result.block_maxima =
        ctx.Zeros({mask.kv_heads(), mask.queries().size(), mask.keys().size()}, wide);
  }
  chosen.forward(ctx, {.q = q,
                       .kv = kv,
                       .mask = mask,
                       .scale = sizes.scale,
                       .o = result.o,
                       .lse = result.lse,
                       .block_maxima = result.block_maxima,
                       .normalization = options.normalization,
                       .bias = sizes.bias});
  return result;
}

void AttentionBackward(Context& ctx, const Tensor& d_out, const Tensor& q, const KvView& kv,
                       const Tensor& lse, const Tensor& delta, const BlockMask& mask, Tensor& dq,
                       const KvGradView& dkv, const AttentionOptions& options, const Tensor& dlse) {
  constexpr const char* kOp = "AttentionBackward";
  const Sizes sizes = RequireInputs(ctx, kOp, q, kv, mask, options);
  const DType wide = AccumulatorOf(q.dtype());
  RequireTensor(kOp, "d_out", d_out, q.shape(), wide, q.dtype());
  RequireDevice(ctx, kOp, "d_out", d_out);
  RequireRowStatistics(ctx, kOp, options.normalization, {sizes.tokens, sizes.heads}, wide, lse,
                       delta, dlse);
  RequireTensor(kOp, "dq", dq, q.shape(), wide, wide);
  RequireDevice(ctx, kOp, "dq", dq);
  if (!mask.empty()) {
    Require(
        dkv.dk.defined() && dkv.dv.defined() && dkv.dk.dtype() == wide && dkv.dv.dtype() == wide,
        kOp, Str("dkv.dk and dkv.dv must be ", ToString(wide)));
    Require(dkv.table != nullptr, kOp, "dkv has no table");
    RequireDevice(ctx, kOp, "dkv.dk", dkv.dk);
    RequireDevice(ctx, kOp, "dkv.dv", dkv.dv);
    RequireBlocks(kOp, "dkv", mask, *dkv.table, kv.head_dim,
                  std::min(dkv.dk.numel(), dkv.dv.numel()));
  }
  const Implementation& chosen =
      Choose(kOp, options, ctx.device(), ProblemOf(ctx, q, kv, d_out, dq));
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
                        .dkv = dkv,
                        .normalization = options.normalization,
                        .bias = sizes.bias});
}

}  // namespace longspan::ops
