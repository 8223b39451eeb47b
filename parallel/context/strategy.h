#pragma once
#include "ops/attention/attention.h"
#include "parallel/comm/communicator.h"
#include "parallel/context/plan.h"

namespace longspan::parallel {

struct UlyssesSaved;  // ulysses_run.h

// Attention with the sequence split over the cp axis. Every rank passes its own tokens in the order
// of its placement and gets the outputs and gradients of exactly those tokens; results do not
// depend on placement, strategy or rank count beyond rounding. The backward pass takes the options
// of the forward pass.
//
// Shapes    q, o [T, Hq, D]; k, v [T, Hkv, D] with T = plan.local_tokens, which may be 0; lse
//           [T, Hq], undefined of sigmoid
// Dtypes    q, k, v all f32, bf16 or f64; o in that dtype; d_out in it or f32; lse and travelling
//           partial dK/dV f32 (f64)
// Numerics  partial outputs are merged (of sigmoid added) in f32 and rounded once; dK/dV partials
//           travel and add in f32, in an order fixed by the plan
// Sigmoid   an absent bias is that of the whole row on every rank
// Overlap   the transfer of the next stage is in flight while a stage computes: on a CPU kernels
//           move it through ctx.Progress(), on a GPU it runs on the communicator's stream
// Errors    InvalidArgument for operands that do not fit the plan, before anything is sent
// Devices   cpu, cuda (f32 and bf16); `comm` has been given the runtime of `ctx` (UseDevice)
struct ContextAttentionResult {
  Tensor o;
  Tensor lse;                                     // softmax only
  Tensor kept{};                                  // arena kKept of the plan's programs
  std::shared_ptr<const UlyssesSaved> ulysses{};  // of plans that exchange heads
};

ContextAttentionResult ContextAttentionForward(Context& ctx, Communicator& comm,
                                               const AttentionPlan& plan, const Tensor& q,
                                               const Tensor& k, const Tensor& v,
                                               const ops::AttentionOptions& options = {});

// What its transfers are counted as, and the category of the Trace in which its waits for them add
// up (on a GPU, where the host does not wait, nothing does).
Traffic TrafficOf(StrategyKind kind);
const char* WaitCategory(StrategyKind kind);

struct ContextAttentionGrads {
  Tensor dq, dk, dv;  // dtype of q
};

// `saved` is the result of the forward pass with the same plan. Collective.
ContextAttentionGrads ContextAttentionBackward(Context& ctx, Communicator& comm,
                                               const AttentionPlan& plan, const Tensor& d_out,
                                               const Tensor& q, const Tensor& k, const Tensor& v,
                                               const ContextAttentionResult& saved,
                                               const ops::AttentionOptions& options = {});

// Bytes this rank sends for one forward and one backward pass, d_out in `dtype`. Of sigmoid the
// strategies that exchange heads send no row statistics.
struct ContextTraffic {
  int64_t forward_bytes = 0, backward_bytes = 0;
};
ContextTraffic PlannedTraffic(const AttentionPlan& plan, int64_t heads, int64_t kv_heads,
                              int64_t head_dim, DType dtype,
                              ops::Normalization normalization = ops::Normalization::kSoftmax);

}  // namespace longspan::parallel
