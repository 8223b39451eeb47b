#include "ops/autograd/moba.h"

#include "ops/autograd/kept.h"
#include "ops/elementwise/elementwise.h"

namespace longspan::autograd {
namespace {

// What the backward pass needs of the forward pass.
struct MobaSaved {
  Tensor o, lse;  // o in the dtype of q
  ops::RoutedLists lists;
};

}  // namespace

Var Moba(Tape& tape, std::shared_ptr<const ops::MobaPlan> plan, const Var& q, const Var& k,
         const Var& v, const ops::AttentionOptions& options) {
  Context& ctx = tape.context();
  const TraceScope trace(ctx.trace(), "context attention");
  const MobaSaved saved = MakeOnce(tape, KeptKind::kAttention, [&] {
    const MemoryScope scope(ctx.allocator(), MemoryCategory::kAttention);
    const ops::MobaResult result =
        ops::MobaForward(ctx, q.value(), k.value(), v.value(), *plan, options);
    return MobaSaved{ops::Cast(ctx, result.o, q.value().dtype()), result.lse, result.lists};
  });
  const bool wanted = q.requires_grad() || k.requires_grad() || v.requires_grad();
  Var o(saved.o, tape.recording() && wanted);
  if (!o.requires_grad()) return o;
  tape.Record(
      [&ctx, plan = std::move(plan), q, k, v, options, lse = saved.lse, lists = saved.lists, o] {
        if (!o.grad().defined()) return;
        const TraceScope scope(ctx.trace(), "context attention");
        const Tensor delta = ops::AttentionDelta(ctx, o.grad(), o.value());
        const ops::MobaGradients grads = ops::MobaBackward(
            ctx, o.grad(), q.value(), k.value(), v.value(), lse, delta, lists, *plan, options);
        const DType dtype = q.value().dtype();
        q.AddGrad(ctx, ops::Cast(ctx, grads.dq, dtype));
        k.AddGrad(ctx, ops::Cast(ctx, grads.dk, dtype));
        v.AddGrad(ctx, ops::Cast(ctx, grads.dv, dtype));
      });
  return o;
}

}  // namespace longspan::autograd
