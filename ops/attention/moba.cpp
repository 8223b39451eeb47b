#include "ops/attention/moba.h"

#include <algorithm>
#include <cmath>

#include "ops/attention/arguments.h"
#include "ops/attention/cpu/attention_cpu.h"
#include "ops/attention/cpu/routed_cpu.h"
#include "ops/attention/cuda/routed_cuda.h"

namespace longspan::ops {
namespace {

// ---- implementation table --------------------------------------------------------------------

struct Implementation {
  const char* name;
  DeviceKind device;
  void (*route)(Context&, const RouteArgs&);
  void (*forward)(Context&, const RoutedForwardArgs&);
  void (*backward)(Context&, const RoutedBackwardArgs&);
};

template <const BlockKernels& kKernels>
constexpr Implementation Blocked(const char* name) {
  return {name, DeviceKind::kCpu,
          [](Context& ctx, const RouteArgs& args) { cpu::BlockedRoute(ctx, kKernels, args); },
          [](Context& ctx, const RoutedForwardArgs& args) {
            cpu::BlockedRoutedForward(ctx, kKernels, args);
          },
          [](Context& ctx, const RoutedBackwardArgs& args) {
            cpu::BlockedRoutedBackward(ctx, kKernels, args);
          }};
}

#if defined(LONGSPAN_HAVE_AVX512)
template <const Bf16Kernels& (*kKernels)()>
constexpr Implementation Bf16(const char* name) {
  return {name, DeviceKind::kCpu,
          [](Context& ctx, const RouteArgs& args) {
            cpu::BlockedRoute(ctx, avx512::kBlockKernels, args);  // gates are f32
          },
          [](Context& ctx, const RoutedForwardArgs& args) {
            cpu::Bf16RoutedForward(ctx, kKernels(), args);
          },
          [](Context& ctx, const RoutedBackwardArgs& args) {
            cpu::Bf16RoutedBackward(ctx, kKernels(), args);
          }};
}
const Bf16Kernels& Avx512Bf16Kernels() { return avx512_bf16::kKernels; }
#endif

constexpr Implementation kTable[] = {
#if defined(LONGSPAN_HAVE_AVX512)
    Bf16<cpu::AmxKernels>("amx_bf16"),
    Bf16<Avx512Bf16Kernels>("avx512_bf16"),
    Blocked<avx512::kBlockKernels>("avx512"),
#endif
    Blocked<portable::kBlockKernels>("portable"),
    {"reference", DeviceKind::kCpu, cpu::ReferenceRoute, cpu::ReferenceRoutedForward,
     cpu::ReferenceRoutedBackward},
    {"reference_cuda", DeviceKind::kCuda, internal::RouteCuda, internal::RoutedForwardCuda,
     internal::RoutedBackwardCuda},
};

// Why the entry cannot run the problem: what attention.h's entry of that name says.
std::string Rejects(const Implementation& entry, const AttentionProblem& problem) {
  for (const AttentionImplementation& other : AttentionImplementations()) {
    if (other.device == entry.device && std::string(other.name) == entry.name) {
      return other.rejects(problem);
    }
  }
  return "";
}

std::string JoinedNames(DeviceKind device) {
  std::string names;
  for (const std::string& name : MobaImplementations(device)) {
    names += (names.empty() ? "" : ", ") + name;
  }
  return names;
}

const Implementation& Choose(const char* op, const std::string& forced, const Context& ctx,
                             const AttentionProblem& problem) {
  const DeviceKind device = ctx.device().kind;
  std::string reasons;
  for (const Implementation& entry : kTable) {
    if (entry.device != device || (!forced.empty() && forced != entry.name)) continue;
    const std::string reason = Rejects(entry, problem);
    if (reason.empty()) return entry;
    if (!forced.empty()) {
      throw InvalidArgument(Str(op, ": implementation ", entry.name, " cannot run this: ", reason));
    }
    reasons += Str(reasons.empty() ? "" : "; ", entry.name, ": ", reason);
  }
  if (!forced.empty()) {
    throw InvalidArgument(Str(op, ": implementation ", forced, " has no routed attention on ",
                              ToString(ctx.device()), "; use one of ", JoinedNames(device)));
  }
  throw Unsupported(Str(op, ": nothing on ", ToString(ctx.device()), " can run this",
                        reasons.empty() ? "" : ": ", reasons));
}

// ---- validation ------------------------------------------------------------------------------

void Require(bool holds, const char* op, const std::string& what) {
  if (!holds) throw InvalidArgument(Str(op, ": ", what));
}

std::string Described(const Tensor& t) { return t.defined() ? t.Describe() : "undefined"; }

void RequireTensor(const Context& ctx, const char* op, const char* name, const Tensor& t,
                   Shape shape, DType dtype, DType other) {
  const std::string dtypes =
      dtype == other ? ToString(dtype) : Str(ToString(dtype), " or ", ToString(other));
  Require(t.defined() && t.shape() == shape && (t.dtype() == dtype || t.dtype() == other), op,
          Str(name, " is ", Described(t), " but must be ", dtypes, shape.ToString()));
  internal::RequireDevice(ctx, op, name, t);
}

void RequireQueriesAndKeys(const Context& ctx, const char* op, const Tensor& q, const Tensor& k,
                           const MobaPlan& plan) {
  const int64_t tokens = plan.blocks->tokens(), kv_heads = plan.own->kv_heads();
  Require(q.defined() && q.rank() == 3 && IsFloat(q.dtype()) && q.dim(0) == tokens &&
              q.dim(2) >= 1 && q.dim(1) >= 1 && q.dim(1) % kv_heads == 0,
          op,
          Str("q is ", Described(q), " but must be f32, bf16 or f64 [", tokens, ", a multiple of ",
              kv_heads, " heads, head_dim]"));
  internal::RequireDevice(ctx, op, "q", q);
  RequireTensor(ctx, op, "k", k, {tokens, kv_heads, q.dim(2)}, q.dtype(), q.dtype());
}

// What kernels index the lists by; what is in them is trusted.
void RequireLists(const Context& ctx, const char* op, const RoutedLists& lists, const Tensor& q,
                  const MobaPlan& plan) {
  Require(lists.rows == q.dim(0) && lists.heads == q.dim(1) && lists.width == plan.width() &&
              lists.blocks == plan.blocks->count(),
          op,
          Str("lists are of ", lists.rows, " rows, ", lists.heads, " heads, ", lists.blocks,
              " blocks and width ", lists.width, "; they must be those of the forward pass"));
  const auto require = [&](const char* name, const Tensor& t, Shape shape, DType dtype) {
    RequireTensor(ctx, op, name, t, shape, dtype, dtype);
  };
  require("lists.selected", lists.selected, {lists.heads, lists.rows, lists.width}, DType::kI32);
  require("lists.offsets", lists.offsets, {lists.blocks * lists.heads + 1}, DType::kI64);
  require("lists.query_rows", lists.query_rows, {lists.heads * lists.rows * lists.width},
          DType::kI32);
}

double RequireOptions(const char* op, const Tensor& q, const AttentionOptions& options) {
  Require(std::isfinite(options.scale), op, Str("options.scale is ", options.scale));
  Require(!options.round_output, op, "options.round_output is true; o is f32 (f64) here");
  Require(options.normalization == Normalization::kSoftmax, op,
          "options.normalization is sigmoid; attention to chosen blocks computes softmax only");
  return options.scale != 0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(q.dim(2)));
}

AttentionProblem ProblemOf(const Tensor& q, const Tensor& k) {
  return {.dtype = q.dtype(), .heads = q.dim(1), .kv_heads = k.dim(1), .head_dim = q.dim(2)};
}

Tensor Select(Context& ctx, const Implementation& entry, const Tensor& q, const Tensor& k,
              const MobaPlan& plan) {
  const TraceScope trace(ctx.trace(), "attention gate");
  Tensor selected = ctx.Empty({q.dim(1), q.dim(0), plan.width()}, DType::kI32);
  if (selected.numel() == 0) return selected;
  const Tensor means = BlockMeans(ctx, k, *plan.blocks);
  entry.route(ctx, {.q = q, .means = means, .blocks = *plan.blocks, .selected = selected});
  return selected;
}

}  // namespace

std::vector<std::string> MobaOptions::Problems() const {
  std::vector<std::string> problems;
  if (!IsChoiceBlock(block_size)) {
    problems.push_back(
        Str("moba.block_size is ", block_size, "; it must be a multiple of 64 from 64 to 2^31"));
  }
  if (top_k < 1 || top_k > int64_t{1} << 31) {
    problems.push_back(Str("moba.top_k is ", top_k, "; it must be between 1 and 2^31"));
  }
  return problems;
}

std::string MobaOptions::ToString() const { return Str("moba block ", block_size, " top ", top_k); }

int64_t MobaPlan::NominalPairs() const {
  int64_t pairs = 0;
  const Documents& documents = *blocks->documents;
  for (int64_t b = 0; b < blocks->count(); ++b) {
    const int64_t begin = blocks->begin[static_cast<size_t>(b)], n = blocks->TokensOf(b);
    const int64_t before = begin - documents.doc_begin[static_cast<size_t>(begin)];
    pairs += n * (n + 1) / 2 +
             n * std::min(before, std::min(options.top_k - 1, blocks->CandidatesOf(b)) *
                                      options.block_size);
  }
  return pairs;
}

std::shared_ptr<const MobaPlan> MobaPlan::Build(const MobaOptions& options, int64_t kv_heads,
                                                std::shared_ptr<const Documents> documents) {
  const std::vector<std::string> problems = options.Problems();
  if (!problems.empty()) throw InvalidArgument(problems.front());
  auto plan = std::make_shared<MobaPlan>();
  plan->options = options;
  plan->blocks = RoutedBlocks::Build(options.block_size, documents);
  // Blocks as documents of their own, under a causal mask.
  const auto cut = std::make_shared<const Documents>(
      Documents::FromEnds(documents->row_length, plan->blocks->EndsByRow()));
  const BlockList all = BlockList::All(*cut);
  plan->own = BlockMask::Build(AttentionPattern::Causal(), kv_heads, cut, all, all);
  return plan;
}

std::vector<std::string> MobaImplementations(DeviceKind device) {
  std::vector<std::string> names;
  for (const Implementation& entry : kTable) {
    if (entry.device == device) names.push_back(entry.name);
  }
  return names;
}

Tensor MobaSelect(Context& ctx, const Tensor& q, const Tensor& k, const MobaPlan& plan,
                  const AttentionOptions& options) {
  constexpr const char* kOp = "MobaSelect";
  RequireQueriesAndKeys(ctx, kOp, q, k, plan);
  return Select(ctx, Choose(kOp, options.implementation, ctx, ProblemOf(q, k)), q, k, plan);
}

MobaResult MobaForward(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                       const MobaPlan& plan, const AttentionOptions& options) {
  constexpr const char* kOp = "MobaForward";
  RequireQueriesAndKeys(ctx, kOp, q, k, plan);
  RequireTensor(ctx, kOp, "v", v, k.shape(), k.dtype(), k.dtype());
  const double scale = RequireOptions(kOp, q, options);
  const Implementation& entry = Choose(kOp, options.implementation, ctx, ProblemOf(q, k));
  const AttentionResult own =
      AttentionForward(ctx, q, MakeKvView(k, v, *plan.own), *plan.own, options);
  MobaResult result{.o = own.o, .lse = own.lse, .lists = {}, .implementation = entry.name};
  if (plan.width() == 0) return result;
  result.lists = BuildRoutedLists(ctx, Select(ctx, entry, q, k, plan), plan.blocks->count());
  const TraceScope trace(ctx.trace(), "attention");
  entry.forward(ctx, {.q = q,
                      .k = k,
                      .v = v,
                      .blocks = *plan.blocks,
                      .lists = result.lists,
                      .scale = scale,
                      .o = result.o,
                      .lse = result.lse});
  return result;
}

MobaGradients MobaBackward(Context& ctx, const Tensor& d_out, const Tensor& q, const Tensor& k,
                           const Tensor& v, const Tensor& lse, const Tensor& delta,
                           const RoutedLists& lists, const MobaPlan& plan,
                           const AttentionOptions& options) {
  constexpr const char* kOp = "MobaBackward";
  RequireQueriesAndKeys(ctx, kOp, q, k, plan);
  RequireTensor(ctx, kOp, "v", v, k.shape(), k.dtype(), k.dtype());
  const double scale = RequireOptions(kOp, q, options);
  const DType wide = AccumulatorOf(q.dtype());
  RequireTensor(ctx, kOp, "d_out", d_out, q.shape(), wide, q.dtype());
  RequireTensor(ctx, kOp, "lse", lse, {q.dim(0), q.dim(1)}, wide, wide);
  RequireTensor(ctx, kOp, "delta", delta, {q.dim(0), q.dim(1)}, wide, wide);
  const int64_t width = plan.width();
  if (width > 0) RequireLists(ctx, kOp, lists, q, plan);
  const Implementation& entry = Choose(kOp, options.implementation, ctx, ProblemOf(q, k));
  MobaGradients grads{.dq = ctx.Zeros(q.shape(), wide),
                      .dk = ctx.Zeros(k.shape(), wide),
                      .dv = ctx.Zeros(v.shape(), wide)};
  AttentionBackward(ctx, d_out, q, MakeKvView(k, v, *plan.own), lse, delta, *plan.own, grads.dq,
                    MakeKvGradView(grads.dk, grads.dv, *plan.own), options);
  if (width == 0) return grads;
  const TraceScope trace(ctx.trace(), "attention");
  entry.backward(ctx, {.d_out = d_out,
                       .q = q,
                       .k = k,
                       .v = v,
                       .lse = lse,
                       .delta = delta,
                       .blocks = *plan.blocks,
                       .lists = lists,
                       .scale = scale,
                       .dq = grads.dq,
                       .dk = grads.dk,
                       .dv = grads.dv});
  return grads;
}

}  // namespace longspan::ops
