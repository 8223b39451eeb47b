#include "parallel/context/autograd.h"

#include "ops/autograd/kept.h"

namespace longspan::parallel {

autograd::Var ContextAttention(autograd::Tape& tape, Communicator& comm,
                               std::shared_ptr<const AttentionPlan> plan, const autograd::Var& q,
                               const autograd::Var& k, const autograd::Var& v,
                               const ops::AttentionOptions& options) {
  Context& ctx = tape.context();
  const auto saved = autograd::MakeOnce(tape, autograd::KeptKind::kAttention, [&] {
    const MemoryScope scope(ctx.allocator(), MemoryCategory::kAttention);
    return ContextAttentionForward(ctx, comm, *plan, q.value(), k.value(), v.value(), options);
  });
  const bool differentiated =
      tape.recording() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  autograd::Var out(saved.o, differentiated);
  if (!differentiated) return out;  // of all ranks alike
  tape.Record([&ctx, &comm, plan = std::move(plan), q, k, v, options, saved, out] {
    // Ranks must not differ in issuing the collectives: a missing gradient counts as zero.
    const Tensor d_out =
        out.grad().defined() ? out.grad() : ctx.Zeros(saved.o.shape(), saved.o.dtype());
    const auto grads = ContextAttentionBackward(ctx, comm, *plan, d_out, q.value(), k.value(),
                                                v.value(), saved, options);
    q.AddGrad(ctx, grads.dq);
    k.AddGrad(ctx, grads.dk);
    v.AddGrad(ctx, grads.dv);
  });
  return out;
}

}  // namespace longspan::parallel
