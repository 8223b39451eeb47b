#include "ops/attention/moba.h"

#include <algorithm>

#include "ops/attention/arguments.h"
#include "ops/attention/routed_arguments.h"

namespace longspan::ops {
namespace {

void Require(bool holds, const char* op, const std::string& what) {
  if (!holds) throw InvalidArgument(Str(op, ": ", what));
}

using internal::RequireTensor;

void RequireQueriesAndKeys(const Context& ctx, const char* op, const Tensor& q, const Tensor& k,
                           const MobaPlan& plan) {
  const int64_t tokens = plan.blocks->tokens(), kv_heads = plan.own->kv_heads();
  Require(q.defined() && q.rank() == 3 && IsFloat(q.dtype()) && q.dim(0) == tokens &&
              q.dim(2) >= 1 && q.dim(1) >= 1 && q.dim(1) % kv_heads == 0,
          op,
          Str("q is ", q.defined() ? q.Describe() : "undefined", " but must be f32, bf16 or f64 [",
              tokens, ", a multiple of ", kv_heads, " heads, head_dim]"));
  internal::RequireDevice(ctx, op, "q", q);
  RequireTensor(ctx, op, "k", k, {tokens, kv_heads, q.dim(2)}, q.dtype(), q.dtype());
}

Tensor Select(Context& ctx, const Tensor& q, const Tensor& k, const MobaPlan& plan,
              const AttentionOptions& options) {
  const int64_t width = plan.width();
  if (width == 0) return ctx.Empty({q.dim(1), q.dim(0), 0}, DType::kI32);
  const Tensor means = BlockMeans(ctx, k, *plan.blocks, plan.share);
  return SelectBlocks(ctx, q, means, *plan.queries, width, options);
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

int64_t ChosenWidth(const MobaOptions& options, const RoutedBlocks& blocks) {
  return std::min(options.top_k - 1, blocks.MostCandidates());
}

std::shared_ptr<const Documents> BlocksAsDocuments(const RoutedBlocks& blocks) {
  return std::make_shared<const Documents>(
      Documents::FromEnds(blocks.documents->row_length, blocks.EndsByRow()));
}

int64_t NominalChosenPairs(const MobaOptions& options, const RoutedBlocks& blocks,
                           const RoutedShare& share) {
  int64_t pairs = 0;
  const Documents& documents = *blocks.documents;
  for (int64_t i = 0; i < share.count(); ++i) {
    const int32_t b = share.block[static_cast<size_t>(i)];
    const int64_t begin = blocks.begin[static_cast<size_t>(b)];
    const int64_t before = begin - documents.doc_begin[static_cast<size_t>(begin)];
    pairs +=
        share.TokensOf(i) *
        std::min(before, std::min(options.top_k - 1, blocks.CandidatesOf(b)) * options.block_size);
  }
  return pairs;
}

int64_t MobaPlan::NominalPairs() const {
  int64_t pairs = NominalChosenPairs(options, *blocks, share);
  for (int64_t b = 0; b < blocks->count(); ++b) {
    const int64_t n = blocks->TokensOf(b);
    pairs += n * (n + 1) / 2;
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
  plan->share = RoutedShare::All(*plan->blocks);
  plan->queries = RoutedQueries::Of(*plan->blocks, plan->share);
  const auto cut = BlocksAsDocuments(*plan->blocks);
  const BlockList all = BlockList::All(*cut);
  plan->own = BlockMask::Build(AttentionPattern::Causal(), kv_heads, cut, all, all);
  return plan;
}

std::vector<std::string> MobaImplementations(DeviceKind device) {
  return RoutedImplementations(device);
}

Tensor MobaSelect(Context& ctx, const Tensor& q, const Tensor& k, const MobaPlan& plan,
                  const AttentionOptions& options) {
  RequireQueriesAndKeys(ctx, "MobaSelect", q, k, plan);
  return Select(ctx, q, k, plan, options);
}

MobaResult MobaForward(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                       const MobaPlan& plan, const AttentionOptions& options) {
  constexpr const char* kOp = "MobaForward";
  RequireQueriesAndKeys(ctx, kOp, q, k, plan);
  RequireTensor(ctx, kOp, "v", v, k.shape(), k.dtype(), k.dtype());
  const char* chosen = internal::RequireRouted(ctx, kOp, q, k.dim(1), options);
  const AttentionResult own =
      AttentionForward(ctx, q, MakeKvView(k, v, *plan.own), *plan.own, options);
  MobaResult result{.o = own.o, .lse = own.lse, .lists = {}, .implementation = chosen};
  if (plan.width() == 0) return result;
  result.lists = BuildRoutedLists(ctx, Select(ctx, q, k, plan, options), plan.blocks->count());
  RoutedForward(ctx, q, MakeRoutedKvView(k, v, *plan.blocks), *plan.blocks, *plan.queries,
                result.lists, result.o, result.lse, options);
  return result;
}

MobaGradients MobaBackward(Context& ctx, const Tensor& d_out, const Tensor& q, const Tensor& k,
                           const Tensor& v, const Tensor& lse, const Tensor& delta,
                           const RoutedLists& lists, const MobaPlan& plan,
                           const AttentionOptions& options) {
  constexpr const char* kOp = "MobaBackward";
  RequireQueriesAndKeys(ctx, kOp, q, k, plan);
  RequireTensor(ctx, kOp, "v", v, k.shape(), k.dtype(), k.dtype());
  internal::RequireRouted(ctx, kOp, q, k.dim(1), options);
  const DType wide = AccumulatorOf(q.dtype());
  RequireTensor(ctx, kOp, "d_out", d_out, q.shape(), wide, q.dtype());
  RequireTensor(ctx, kOp, "lse", lse, {q.dim(0), q.dim(1)}, wide, wide);
  RequireTensor(ctx, kOp, "delta", delta, {q.dim(0), q.dim(1)}, wide, wide);
  const int64_t width = plan.width();
  if (width > 0) internal::RequireLists(ctx, kOp, lists, q, *plan.blocks, width);
  MobaGradients grads{.dq = ctx.Zeros(q.shape(), wide),
                      .dk = ctx.Zeros(k.shape(), wide),
                      .dv = ctx.Zeros(v.shape(), wide)};
  AttentionBackward(ctx, d_out, q, MakeKvView(k, v, *plan.own), lse, delta, *plan.own, grads.dq,
                    MakeKvGradView(grads.dk, grads.dv, *plan.own), options);
  if (width == 0) return grads;
  const KvView kv = MakeRoutedKvView(k, v, *plan.blocks);
  const RoutedBackward in{.d_out = d_out,
                          .q = q,
                          .kv = kv,
                          .lse = lse,
                          .delta = delta,
                          .blocks = *plan.blocks,
                          .queries = *plan.queries,
                          .lists = lists};
  RoutedKeyGradient(ctx, in, MakeRoutedKvGradView(grads.dk, grads.dv, *plan.blocks), options);
  RoutedQueryGradient(ctx, in, grads.dq, options);
  return grads;
}

}  // namespace longspan::ops
