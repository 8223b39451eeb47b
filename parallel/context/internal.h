#pragma once
#include "parallel/context/strategy.h"

// What the strategies share. Not for use outside parallel/context.
namespace longspan::parallel::internal {

// K and V of one rank as one message: [2, T, Hkv, D].
Tensor PackKv(Context& ctx, const Tensor& k, const Tensor& v);
// The halves of a packed buffer.
Tensor FirstHalf(const Tensor& kv);
Tensor SecondHalf(const Tensor& kv);

ContextAttentionResult RingForward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                                   const Tensor& q, const Tensor& k, const Tensor& v,
                                   const ops::AttentionOptions& options);
// dq, dkv: zeroed f32 (f64) accumulators of this rank's tokens, [T, Hq, D] and [2, T, Hkv, D].
void RingBackward(Context& ctx, Communicator& comm, const AttentionPlan& plan, const Tensor& d_out,
                  const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& delta,
                  const ContextAttentionResult& saved, const ops::AttentionOptions& options,
                  Tensor& dq, Tensor& dkv);

ContextAttentionResult AllGatherForward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                                        const Tensor& q, const Tensor& k, const Tensor& v,
                                        const ops::AttentionOptions& options);
void AllGatherBackward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                       const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& delta, const ContextAttentionResult& saved,
                       const ops::AttentionOptions& options, Tensor& dq, Tensor& dkv);

}  // namespace longspan::parallel::internal
