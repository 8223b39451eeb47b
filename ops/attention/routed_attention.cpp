#include "ops/attention/routed_attention.h"

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
  void (*query_gradient)(Context&, const RoutedBackwardArgs&, Tensor& dq);
  void (*key_gradient)(Context&, const RoutedBackwardArgs&, const KvGradView&);
};

template <const BlockKernels& kKernels>
constexpr Implementation Blocked(const char* name) {
  return {name,
          DeviceKind::kCpu,
          [](Context& ctx, const RouteArgs& args) { cpu::BlockedRoute(ctx, kKernels, args); },
          [](Context& ctx, const RoutedForwardArgs& args) {
            cpu::BlockedRoutedForward(ctx, kKernels, args);
          },
          [](Context& ctx, const RoutedBackwardArgs& args, Tensor& dq) {
            cpu::BlockedRoutedQueryGradient(ctx, kKernels, args, dq);
          },
          [](Context& ctx, const RoutedBackwardArgs& args, const KvGradView& dkv) {
            cpu::BlockedRoutedKeyGradient(ctx, kKernels, args, dkv);
          }};
}

#if defined(LONGSPAN_HAVE_AVX512)
template <const Bf16Kernels& (*kKernels)()>
constexpr Implementation Bf16(const char* name) {
  return {name,
          DeviceKind::kCpu,
          [](Context& ctx, const RouteArgs& args) {
            cpu::BlockedRoute(ctx, avx512::kBlockKernels, args);  // gates are f32
          },
          [](Context& ctx, const RoutedForwardArgs& args) {
            cpu::Bf16RoutedForward(ctx, kKernels(), args);
          },
          [](Context& ctx, const RoutedBackwardArgs& args, Tensor& dq) {
            cpu::Bf16RoutedQueryGradient(ctx, kKernels(), args, dq);
          },
          [](Context& ctx, const RoutedBackwardArgs& args, const KvGradView& dkv) {
            cpu::Bf16RoutedKeyGradient(ctx, kKernels(), args, dkv);
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
     cpu::ReferenceRoutedQueryGradient, cpu::ReferenceRoutedKeyGradient},
    {"reference_cuda", DeviceKind::kCuda, internal::RouteCuda, internal::RoutedForwardCuda,
     internal::RoutedQueryGradientCuda, internal::RoutedKeyGradientCuda},
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
  for (const std::string& name : RoutedImplementations(device)) {
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

using internal::RequireLists;
using internal::RequireTensor;

void RequireQueries(const Context& ctx, const char* op, const Tensor& q,
                    const RoutedQueries& queries, int64_t kv_heads) {
  Require(q.defined() && q.rank() == 3 && IsFloat(q.dtype()) && q.dim(0) == queries.rows &&
              q.dim(2) >= 1 && q.dim(1) >= 1 && kv_heads >= 1 && q.dim(1) % kv_heads == 0,
          op,
          Str("q is ", Described(q), " but must be f32, bf16 or f64 [", queries.rows,
              ", a multiple of ", kv_heads, " heads, head_dim]"));
  internal::RequireDevice(ctx, op, "q", q);
}

// `view`: a KvView or KvGradView with the tensors k and v.
template <class View>
void RequireView(const Context& ctx, const char* op, const char* name, const View& view,
                 const Tensor& k, const Tensor& v, DType dtype, int64_t kv_heads,
                 const RoutedBlocks& blocks) {
  Require(k.defined() && v.defined() && k.dtype() == dtype && v.dtype() == dtype &&
              view.table != nullptr,
          op,
          Str(name, " has k ", Described(k), " and v ", Described(v), " but must have two of ",
              ToString(dtype), " and a table"));
  Require(view.table->kv_heads() == kv_heads && view.table->first_block() == 0 &&
              view.table->blocks() == blocks.count(),
          op,
          Str(name, "'s table is of ", view.table->kv_heads(), " kv heads and ",
              view.table->blocks(), " blocks from ", view.table->first_block(),
              " on; it must be of ", kv_heads, " and ", blocks.count(), " from 0 on"));
  internal::RequireDevice(ctx, op, name, k);
  internal::RequireDevice(ctx, op, name, v);
}

void RequireKeys(const Context& ctx, const char* op, const Tensor& q, const KvView& kv,
                 const RoutedBlocks& blocks) {
  Require(kv.head_dim == q.dim(2), op,
          Str("kv has head_dim ", kv.head_dim, " and q is ", q.Describe()));
  RequireView(ctx, op, "kv", kv, kv.k, kv.v, q.dtype(), kv.kv_heads(), blocks);
}

double RequireOptions(const char* op, const Tensor& q, const AttentionOptions& options) {
  Require(std::isfinite(options.scale), op, Str("options.scale is ", options.scale));
  Require(!options.round_output, op, "options.round_output is true; o is f32 (f64) here");
  Require(options.normalization == Normalization::kSoftmax, op,
          "options.normalization is sigmoid; attention to chosen blocks computes softmax only");
  return options.scale != 0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(q.dim(2)));
}

AttentionProblem ProblemOf(const Tensor& q, int64_t kv_heads) {
  return {.dtype = q.dtype(), .heads = q.dim(1), .kv_heads = kv_heads, .head_dim = q.dim(2)};
}

std::shared_ptr<const KvTable> PlainTable(const char* op, const Tensor& k, const Tensor& v,
                                          const RoutedBlocks& blocks) {
  Require(k.defined() && v.defined() && k.rank() == 3 && k.dim(0) == blocks.tokens() &&
              k.shape() == v.shape() && k.dtype() == v.dtype(),
          op,
          Str(Described(k), " and ", Described(v), " must be two [", blocks.tokens(),
              ", kv heads, head_dim] tensors of one dtype"));
  const int64_t heads = k.dim(1), dim = k.dim(2);
  return blocks.tables.Get({heads, dim, {}}, [&] {
    std::vector<int64_t> offsets;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t b = 0; b < blocks.count(); ++b) {
        offsets.push_back((blocks.begin[static_cast<size_t>(b)] * heads + h) * dim);
      }
    }
    return std::make_shared<const KvTable>(heads, heads * dim, 0, std::move(offsets));
  });
}

// Arguments of both gradients, checked, and who computes them.
struct Gradient {
  const Implementation& entry;
  RoutedBackwardArgs args;
};
Gradient MakeGradient(Context& ctx, const char* op, const RoutedBackward& in,
                      const AttentionOptions& options) {
  const Tensor& q = in.q;
  RequireQueries(ctx, op, q, in.queries, in.kv.table == nullptr ? 1 : in.kv.kv_heads());
  RequireKeys(ctx, op, q, in.kv, in.blocks);
  const double scale = RequireOptions(op, q, options);
  const DType wide = AccumulatorOf(q.dtype());
  RequireTensor(ctx, op, "d_out", in.d_out, q.shape(), wide, q.dtype());
  RequireTensor(ctx, op, "lse", in.lse, {q.dim(0), q.dim(1)}, wide, wide);
  RequireTensor(ctx, op, "delta", in.delta, {q.dim(0), q.dim(1)}, wide, wide);
  RequireLists(ctx, op, in.lists, q, in.blocks, std::max<int64_t>(1, in.lists.width));
  return {Choose(op, options.implementation, ctx, ProblemOf(q, in.kv.kv_heads())),
          {.d_out = in.d_out,
           .q = q,
           .kv = in.kv,
           .lse = in.lse,
           .delta = in.delta,
           .blocks = in.blocks,
           .queries = in.queries,
           .lists = in.lists,
           .scale = scale}};
}

}  // namespace

namespace internal {

void RequireTensor(const Context& ctx, const char* op, const char* name, const Tensor& t,
                   Shape shape, DType dtype, DType other) {
  const std::string dtypes =
      dtype == other ? ToString(dtype) : Str(ToString(dtype), " or ", ToString(other));
  Require(t.defined() && t.shape() == shape && (t.dtype() == dtype || t.dtype() == other), op,
          Str(name, " is ", Described(t), " but must be ", dtypes, shape.ToString()));
  internal::RequireDevice(ctx, op, name, t);
}

void RequireLists(const Context& ctx, const char* op, const RoutedLists& lists, const Tensor& q,
                  const RoutedBlocks& blocks, int64_t width) {
  Require(lists.rows == q.dim(0) && lists.heads == q.dim(1) && lists.width == width &&
              lists.blocks == blocks.count(),
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

const char* RequireRouted(const Context& ctx, const char* op, const Tensor& q, int64_t kv_heads,
                          const AttentionOptions& options) {
  RequireOptions(op, q, options);
  return Choose(op, options.implementation, ctx, ProblemOf(q, kv_heads)).name;
}

}  // namespace internal

KvView MakeRoutedKvView(const Tensor& k, const Tensor& v, const RoutedBlocks& blocks) {
  auto table = PlainTable("MakeRoutedKvView", k, v, blocks);
  return {k, v, k.dim(2), std::move(table)};
}

KvGradView MakeRoutedKvGradView(const Tensor& dk, const Tensor& dv, const RoutedBlocks& blocks) {
  return {dk, dv, PlainTable("MakeRoutedKvGradView", dk, dv, blocks)};
}

std::vector<std::string> RoutedImplementations(DeviceKind device) {
  std::vector<std::string> names;
  for (const Implementation& entry : kTable) {
    if (entry.device == device) names.push_back(entry.name);
  }
  return names;
}

Tensor SelectBlocks(Context& ctx, const Tensor& q, const Tensor& means,
                    const RoutedQueries& queries, int64_t width, const AttentionOptions& options) {
  constexpr const char* kOp = "SelectBlocks";
  const bool has_heads = means.defined() && means.rank() == 3;
  RequireQueries(ctx, kOp, q, queries, has_heads ? means.dim(1) : 1);
  Require(has_heads && means.dim(2) == q.dim(2) && means.dtype() == AccumulatorOf(q.dtype()), kOp,
          Str("means is ", Described(means), " but must be ", ToString(AccumulatorOf(q.dtype())),
              " [blocks, kv heads, ", q.dim(2), "]"));
  internal::RequireDevice(ctx, kOp, "means", means);
  Require(width >= 0 && width <= queries.most_candidates, kOp,
          Str("width is ", width, "; it must be 0 to the ", queries.most_candidates,
              " blocks that a token can choose"));
  const Implementation& entry =
      Choose(kOp, options.implementation, ctx, ProblemOf(q, means.dim(1)));
  const TraceScope trace(ctx.trace(), "attention gate");
  Tensor selected = ctx.Empty({q.dim(1), q.dim(0), width}, DType::kI32);
  if (selected.numel() == 0) return selected;
  entry.route(ctx, {.q = q, .means = means, .queries = queries, .selected = selected});
  return selected;
}

void RoutedForward(Context& ctx, const Tensor& q, const KvView& kv, const RoutedBlocks& blocks,
                   const RoutedQueries& queries, const RoutedLists& lists, Tensor& o, Tensor& lse,
                   const AttentionOptions& options) {
  constexpr const char* kOp = "RoutedForward";
  RequireQueries(ctx, kOp, q, queries, kv.table == nullptr ? 1 : kv.kv_heads());
  RequireKeys(ctx, kOp, q, kv, blocks);
  const double scale = RequireOptions(kOp, q, options);
  RequireLists(ctx, kOp, lists, q, blocks, std::max<int64_t>(1, lists.width));
  const DType wide = AccumulatorOf(q.dtype());
  RequireTensor(ctx, kOp, "o", o, q.shape(), wide, wide);
  RequireTensor(ctx, kOp, "lse", lse, {q.dim(0), q.dim(1)}, wide, wide);
  const Implementation& entry =
      Choose(kOp, options.implementation, ctx, ProblemOf(q, kv.kv_heads()));
  if (q.numel() == 0) return;
  const TraceScope trace(ctx.trace(), "attention");
  entry.forward(ctx, {.q = q,
                      .kv = kv,
                      .blocks = blocks,
                      .queries = queries,
                      .lists = lists,
                      .scale = scale,
                      .o = o,
                      .lse = lse});
}

void RoutedQueryGradient(Context& ctx, const RoutedBackward& in, Tensor& dq,
                         const AttentionOptions& options) {
  constexpr const char* kOp = "RoutedQueryGradient";
  const Gradient gradient = MakeGradient(ctx, kOp, in, options);
  const DType wide = AccumulatorOf(in.q.dtype());
  RequireTensor(ctx, kOp, "dq", dq, in.q.shape(), wide, wide);
  if (in.q.numel() == 0) return;
  const TraceScope trace(ctx.trace(), "attention");
  gradient.entry.query_gradient(ctx, gradient.args, dq);
}

void RoutedKeyGradient(Context& ctx, const RoutedBackward& in, const KvGradView& dkv,
                       const AttentionOptions& options) {
  constexpr const char* kOp = "RoutedKeyGradient";
  const Gradient gradient = MakeGradient(ctx, kOp, in, options);
  RequireView(ctx, kOp, "dkv", dkv, dkv.dk, dkv.dv, AccumulatorOf(in.q.dtype()), in.kv.kv_heads(),
              in.blocks);
  if (in.q.numel() == 0) return;
  const TraceScope trace(ctx.trace(), "attention");
  gradient.entry.key_gradient(ctx, gradient.args, dkv);
}

}  // namespace longspan::ops
