#include "parallel/context/strategy.h"

#include <cstring>

#include "ops/core/cuda/backend.h"
#include "ops/elementwise/elementwise.h"
#include "parallel/context/internal.h"

namespace longspan::parallel {
namespace internal {

namespace {

void Copy(Context& ctx, const Tensor& from, const Tensor& to) {
  if (from.bytes() == 0) return;
  if (ctx.device().kind == DeviceKind::kCuda) {
    cuda::CopyOnDevice(ctx.cuda(), to.raw(), from.raw(), from.bytes());
  } else {
    std::memcpy(to.raw(), from.raw(), from.bytes());
  }
}

}  // namespace

Tensor PackKv(Context& ctx, const Tensor& k, const Tensor& v) {
  Tensor kv = ctx.Empty({2, k.dim(0), k.dim(1), k.dim(2)}, k.dtype());
  Copy(ctx, k, FirstHalf(kv));
  Copy(ctx, v, SecondHalf(kv));
  return kv;
}

Tensor FirstHalf(const Tensor& kv) {
  return kv.Rows(0, 1).Reshape({kv.dim(1), kv.dim(2), kv.dim(3)});
}
Tensor SecondHalf(const Tensor& kv) {
  return kv.Rows(1, 2).Reshape({kv.dim(1), kv.dim(2), kv.dim(3)});
}

}  // namespace internal

namespace {

void CheckOperands(const Communicator& comm, const AttentionPlan& plan, const Tensor& q,
                   const Tensor& k, const Tensor& v) {
  LONGSPAN_CHECK(comm.rank() == plan.rank && comm.size() == plan.ranks)
      << "plan of rank " << plan.rank << " of " << plan.ranks << " used on rank " << comm.rank()
      << " of " << comm.size();
  LONGSPAN_CHECK(q.rank() == 3 && k.rank() == 3 && k.shape() == v.shape() && q.dim(0) == k.dim(0))
      << "q " << q.Describe() << ", k " << k.Describe() << ", v " << v.Describe();
  LONGSPAN_CHECK(!plan.stages.empty() && plan.stages[0].mask->queries().tokens() == q.dim(0))
      << "q " << q.Describe() << " has not the plan's number of tokens";
}

}  // namespace

ContextAttentionResult ContextAttentionForward(Context& ctx, Communicator& comm,
                                               const AttentionPlan& plan, const Tensor& q,
                                               const Tensor& k, const Tensor& v,
                                               const ops::AttentionOptions& options) {
  CheckOperands(comm, plan, q, k, v);
  TraceScope scope(ctx.trace(), "context attention");  // kernels, merges, waits
  if (plan.stages.size() == 1 && plan.ranks == 1) {
    ops::AttentionOptions whole = options;
    whole.round_output = true;
    const ops::BlockMask& mask = *plan.stages[0].mask;
    auto r = ops::AttentionForward(ctx, q, ops::MakeKvView(k, v, mask), mask, whole);
    return {r.o, r.lse, {}};
  }
  return plan.strategy == StrategyKind::kRing
             ? internal::RingForward(ctx, comm, plan, q, k, v, options)
             : internal::AllGatherForward(ctx, comm, plan, q, k, v, options);
}

ContextAttentionGrads ContextAttentionBackward(Context& ctx, Communicator& comm,
                                               const AttentionPlan& plan, const Tensor& d_out,
                                               const Tensor& q, const Tensor& k, const Tensor& v,
                                               const ContextAttentionResult& saved,
                                               const ops::AttentionOptions& options) {
  CheckOperands(comm, plan, q, k, v);
  TraceScope scope(ctx.trace(), "context attention");  // kernels, merges, waits
  const DType sum = AccumulatorOf(q.dtype());
  Tensor dq = ctx.Zeros(q.shape(), sum);
  Tensor dkv = ctx.Zeros({2, k.dim(0), k.dim(1), k.dim(2)}, sum);
  const bool softmax = options.normalization == ops::Normalization::kSoftmax;
  const Tensor delta = softmax ? ops::AttentionDelta(ctx, d_out, saved.o) : Tensor();
  if (plan.ranks == 1) {
    const ops::BlockMask& mask = *plan.stages[0].mask;
    const Tensor dk = internal::FirstHalf(dkv), dv = internal::SecondHalf(dkv);
    ops::AttentionBackward(ctx, d_out, q, ops::MakeKvView(k, v, mask), saved.lse, delta, mask, dq,
                           ops::MakeKvGradView(dk, dv, mask), options);
  } else if (plan.strategy == StrategyKind::kRing) {
    internal::RingBackward(ctx, comm, plan, d_out, q, k, v, delta, saved, options, dq, dkv);
  } else {
    internal::AllGatherBackward(ctx, comm, plan, d_out, q, k, v, delta, saved, options, dq, dkv);
  }
  return {ops::Cast(ctx, dq, q.dtype()), ops::Cast(ctx, internal::FirstHalf(dkv), q.dtype()),
          ops::Cast(ctx, internal::SecondHalf(dkv), q.dtype())};
}

ContextTraffic PlannedTraffic(const AttentionPlan& plan, int64_t local_tokens, int64_t kv_heads,
                              int64_t head_dim, DType dtype) {
  const int64_t p = plan.ranks, elements = 2 * local_tokens * kv_heads * head_dim;
  if (p == 1) return {0, 0};
  const int64_t kv = elements * static_cast<int64_t>(SizeOf(dtype));
  const int64_t dkv = elements * static_cast<int64_t>(SizeOf(AccumulatorOf(dtype)));
  if (plan.strategy == StrategyKind::kRing) return {(p - 1) * kv, (p - 2) * kv + (p - 1) * dkv};
  return {(p - 1) * kv, (p - 1) * kv + (p - 1) * dkv};
}

}  // namespace longspan::parallel
