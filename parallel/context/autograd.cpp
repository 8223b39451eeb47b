#include "parallel/context/autograd.h"

#include "ops/autograd/kept.h"

namespace longspan::parallel {
namespace {

// forward() once, also where the tape runs it twice, and backward(d_out, saved) as an entry.
template <class Forward, class Backward>
autograd::Var Attend(autograd::Tape& tape, const autograd::Var& q, const autograd::Var& k,
                     const autograd::Var& v, const Forward& forward, const Backward& backward) {
  Context& ctx = tape.context();
  const auto saved = autograd::MakeOnce(tape, autograd::KeptKind::kAttention, [&] {
    const MemoryScope scope(ctx.allocator(), MemoryCategory::kAttention);
    return forward();
  });
  const bool differentiated =
      tape.recording() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  autograd::Var out(saved.o, differentiated);
  if (!differentiated) return out;  // of all ranks alike
  tape.Record([&ctx, q, k, v, saved, out, backward] {
    // Ranks must not differ in issuing the collectives: a missing gradient counts as zero.
    const Tensor d_out =
        out.grad().defined() ? out.grad() : ctx.Zeros(saved.o.shape(), saved.o.dtype());
    const ContextAttentionGrads grads = backward(d_out, saved);
    q.AddGrad(ctx, grads.dq);
    k.AddGrad(ctx, grads.dk);
    v.AddGrad(ctx, grads.dv);
  });
  return out;
}

}  // namespace

autograd::Var ContextAttention(autograd::Tape& tape, Communicator& comm,
                               std::shared_ptr<const AttentionPlan> plan, const autograd::Var& q,
                               const autograd::Var& k, const autograd::Var& v,
                               const ops::AttentionOptions& options) {
  Context& ctx = tape.context();
  return Attend(
      tape, q, k, v,
      [&] {
        return ContextAttentionForward(ctx, comm, *plan, q.value(), k.value(), v.value(), options);
      },
      [&ctx, &comm, plan, q, k, v, options](const Tensor& d_out,
                                            const ContextAttentionResult& saved) {
        return ContextAttentionBackward(ctx, comm, *plan, d_out, q.value(), k.value(), v.value(),
                                        saved, options);
      });
}

autograd::Var RoutedContextAttention(autograd::Tape& tape, Communicator& comm,
                                     std::shared_ptr<const RoutedPlan> plan, const autograd::Var& q,
                                     const autograd::Var& k, const autograd::Var& v,
                                     const ops::AttentionOptions& options) {
  Context& ctx = tape.context();
  return Attend(
      tape, q, k, v,
      [&] {
        return RoutedContextForward(ctx, comm, *plan, q.value(), k.value(), v.value(), options);
      },
      [&ctx, &comm, plan, q, k, v, options](const Tensor& d_out, const RoutedResult& saved) {
        return RoutedContextBackward(ctx, comm, *plan, d_out, q.value(), k.value(), v.value(),
                                     saved, options);
      });
}

}  // namespace longspan::parallel
