#include "parallel/context/strategy.h"

#include "ops/elementwise/elementwise.h"
#include "parallel/context/choose.h"
#include "parallel/context/executor.h"
#include "parallel/context/strategy_scope.h"
#include "parallel/context/ulysses_run.h"

namespace longspan::parallel {
namespace {

void CheckOperands(const Communicator& comm, const AttentionPlan& plan, const Tensor& q,
                   const Tensor& k, const Tensor& v) {
  LONGSPAN_CHECK(comm.rank() == plan.rank && comm.size() == plan.ranks)
      << "plan of rank " << plan.rank << " of " << plan.ranks << " used on rank " << comm.rank()
      << " of " << comm.size();
  LONGSPAN_CHECK(q.rank() == 3 && k.rank() == 3 && k.shape() == v.shape() && q.dim(0) == k.dim(0) &&
                 q.dim(2) == k.dim(2) && q.dtype() == k.dtype() && k.dtype() == v.dtype())
      << "q " << q.Describe() << ", k " << k.Describe() << ", v " << v.Describe();
  LONGSPAN_CHECK(q.dim(0) == plan.local_tokens)
      << "q " << q.Describe() << " has not the plan's number of tokens, " << plan.local_tokens;
  LONGSPAN_CHECK(k.dim(1) == plan.kv_heads)
      << "k " << k.Describe() << " has not the plan's number of kv heads, " << plan.kv_heads;
  LONGSPAN_CHECK(plan.ulysses == nullptr || plan.ulysses->heads == q.dim(1))
      << "q " << q.Describe() << " but the plan deals " << (plan.ulysses ? plan.ulysses->heads : 0)
      << " query heads; set StrategyOptions::heads to " << q.dim(1);
}

// On one rank: one kernel, rounded once.
ContextAttentionResult WholeForward(Context& ctx, const ops::BlockMask& mask, const Tensor& q,
                                    const Tensor& k, const Tensor& v,
                                    ops::AttentionOptions options) {
  options.round_output = true;
  const auto r = ops::AttentionForward(ctx, q, ops::MakeKvView(k, v, mask), mask, options);
  return {.o = r.o, .lse = r.lse};
}

BackwardOutput WholeBackward(Context& ctx, const ops::BlockMask& mask, const Tensor& d_out,
                             const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                             const Tensor& delta, const ops::AttentionOptions& options) {
  const DType wide = AccumulatorOf(q.dtype());
  BackwardOutput grads{ctx.Zeros(q.shape(), wide), ctx.Zeros(k.shape(), wide),
                       ctx.Zeros(v.shape(), wide)};
  ops::AttentionBackward(ctx, d_out, q, ops::MakeKvView(k, v, mask), lse, delta, mask, grads.dq,
                         ops::MakeKvGradView(grads.dk, grads.dv, mask), options);
  return grads;
}

}  // namespace

Traffic TrafficOf(StrategyKind kind) {
  switch (kind) {
    case StrategyKind::kRing:
      return Traffic::kRing;
    case StrategyKind::kDoubleRing:
      return Traffic::kDoubleRing;
    case StrategyKind::kAllGather:
      return Traffic::kAllGather;
    case StrategyKind::kUlysses:
      return Traffic::kUlysses;
    case StrategyKind::kHybrid:
      return Traffic::kHybrid;
    case StrategyKind::kExchange:
      return Traffic::kExchange;
    case StrategyKind::kAuto:
      break;
  }
  return Traffic::kPayload;
}

const char* WaitCategory(StrategyKind kind) {
  switch (kind) {
    case StrategyKind::kRing:
      return "wait of ring";
    case StrategyKind::kDoubleRing:
      return "wait of double_ring";
    case StrategyKind::kAllGather:
      return "wait of all_gather";
    case StrategyKind::kUlysses:
      return "wait of ulysses";
    case StrategyKind::kHybrid:
      return "wait of hybrid";
    case StrategyKind::kExchange:
      return "wait of exchange";
    case StrategyKind::kAuto:
      break;
  }
  return "wait of auto";
}

ContextAttentionResult ContextAttentionForward(Context& ctx, Communicator& comm,
                                               const AttentionPlan& plan, const Tensor& q,
                                               const Tensor& k, const Tensor& v,
                                               const ops::AttentionOptions& options) {
  CheckOperands(comm, plan, q, k, v);
  const TraceScope scope(ctx.trace(), "context attention");  // kernels, merges, waits
  const StrategyScope counted(ctx, comm, TrafficOf(plan.strategy), WaitCategory(plan.strategy));
  if (plan.ranks == 1) return WholeForward(ctx, *plan.whole, q, k, v, options);
  if (plan.ulysses != nullptr) {
    UlyssesOutput out = UlyssesForward(ctx, comm, *plan.ulysses, q, k, v, options);
    return {.o = out.o, .lse = out.lse, .ulysses = std::move(out.saved)};
  }
  ForwardOutput out = RunForward(ctx, comm, plan.forward, q, k, v, options);
  return {.o = out.o, .lse = out.lse, .kept = out.kept};
}

ContextAttentionGrads ContextAttentionBackward(Context& ctx, Communicator& comm,
                                               const AttentionPlan& plan, const Tensor& d_out,
                                               const Tensor& q, const Tensor& k, const Tensor& v,
                                               const ContextAttentionResult& saved,
                                               const ops::AttentionOptions& options) {
  CheckOperands(comm, plan, q, k, v);
  LONGSPAN_CHECK(d_out.shape() == q.shape())
      << "d_out " << d_out.Describe() << " but q " << q.Describe();
  const TraceScope scope(ctx.trace(), "context attention");  // kernels, merges, waits
  const StrategyScope counted(ctx, comm, TrafficOf(plan.strategy), WaitCategory(plan.strategy));
  const bool softmax = options.normalization == ops::Normalization::kSoftmax;
  const Tensor delta = softmax ? ops::AttentionDelta(ctx, d_out, saved.o) : Tensor();
  if (plan.ulysses != nullptr) {
    LONGSPAN_CHECK(saved.ulysses != nullptr) << "the saved result is not of this plan";
    UlyssesGrads grads =
        UlyssesBackward(ctx, comm, *plan.ulysses, d_out, delta, *saved.ulysses, q.dtype(), options);
    return {grads.dq, grads.dk, grads.dv};
  }
  const BackwardOutput grads =
      plan.ranks == 1 ? WholeBackward(ctx, *plan.whole, d_out, q, k, v, saved.lse, delta, options)
                      : RunBackward(ctx, comm, plan.backward, d_out, q, k, v, saved.lse, delta,
                                    saved.kept, options);
  return {ops::Cast(ctx, grads.dq, q.dtype()), ops::Cast(ctx, grads.dk, q.dtype()),
          ops::Cast(ctx, grads.dv, q.dtype())};
}

ContextTraffic PlannedTraffic(const AttentionPlan& plan, int64_t heads, int64_t kv_heads,
                              int64_t head_dim, DType dtype, ops::Normalization normalization) {
  LONGSPAN_CHECK(kv_heads == plan.kv_heads)
      << "PlannedTraffic: " << kv_heads << " kv heads but the plan has " << plan.kv_heads;
  const auto bytes = [](const Timeline& timeline) {
    int64_t sum = 0;
    for (const TimelineEvent& event : timeline) {
      for (const TimelineMessage& m : event.sends) sum += m.bytes;
    }
    return sum;
  };
  const PlanTimelines timelines =
      MakeTimelines(plan, {.heads = heads,
                           .head_dim = head_dim,
                           .dtype = dtype,
                           .sigmoid = normalization == ops::Normalization::kSigmoid});
  return {bytes(timelines.forward), bytes(timelines.backward)};
}

}  // namespace longspan::parallel
