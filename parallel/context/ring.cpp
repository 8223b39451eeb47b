// Ring attention (arXiv 2310.01889) over any placement, with the backward pass in reverse order.
//
// Forward: at stage s rank r holds the keys of rank r - s; they hop to r + 1 while the stage
// computes. Backward: stage t works on the keys of rank r + 1 + t, so it starts with what the
// forward pass received last and ends with its own. Keys hop to r - 1 (P - 2 hops: the last stage
// needs only local keys), and the sum of dK/dV of those keys follows one stage behind (P - 1 hops):
// whoever works on rank j's keys adds its share and passes the sum on, and rank j adds its own
// share last.
#include "parallel/context/internal.h"

#include "ops/elementwise/elementwise.h"

namespace longspan::parallel::internal {
namespace {

// One hop around the ring: `out` goes to rank + direction, `in` comes from rank - direction.
// Undefined tensors are not sent or received; all ranks agree because they follow the same stage.
void AddHop(std::vector<Send>& sends, std::vector<Recv>& recvs, const Communicator& comm,
            int direction, const Tensor& out, const Tensor& in) {
  const int p = comm.size();
  const int to = (comm.rank() + direction + p) % p, from = (comm.rank() - direction + p) % p;
  if (out.defined()) sends.push_back(SendOf(to, out));
  if (in.defined()) recvs.push_back(RecvInto(from, in));
}

// Adds the result over keys that `o` and `lse` have not seen yet.
void Merge(Context& ctx, ops::Normalization normalization, Tensor& o, Tensor& lse,
           const ops::AttentionResult& part) {
  if (normalization == ops::Normalization::kSigmoid) {
    ops::AddInto(ctx, o, part.o);
  } else {
    ops::MergePartial(ctx, o, lse, part.o, part.lse);
  }
}

void WaitTraced(Context& ctx, Work& work) {
  TraceScope scope(ctx.trace(), "communication wait");
  work.Wait();
}

}  // namespace

ContextAttentionResult RingForward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                                   const Tensor& q, const Tensor& k, const Tensor& v,
                                   const ops::AttentionOptions& options) {
  const int p = plan.ranks;
  Tensor held = PackKv(ctx, k, v), next, o, lse;
  for (int s = 0; s < p; ++s) {
    Work hop;
    if (s + 1 < p) {
      next = ctx.Empty(held.shape(), held.dtype());
      std::vector<Send> sends;
      std::vector<Recv> recvs;
      AddHop(sends, recvs, comm, +1, held, next);
      hop = comm.Exchange(std::move(sends), std::move(recvs));
    }
    const ops::BlockMask& mask = *plan.stages[static_cast<size_t>(s)].mask;
    if (s == 0 || !mask.empty()) {  // stage 0 always runs: it initialises o and lse
      const auto kv = ops::MakeKvView(FirstHalf(held), SecondHalf(held), mask);
      const auto part = ops::AttentionForward(ctx, q, kv, mask, options);
      if (s == 0) {
        o = part.o;
        lse = part.lse;
      } else {
        Merge(ctx, options.normalization, o, lse, part);
      }
    }
    WaitTraced(ctx, hop);
    if (s + 1 < p) held = next;
  }
  return {ops::Cast(ctx, o, q.dtype()), lse, held};
}

void RingBackward(Context& ctx, Communicator& comm, const AttentionPlan& plan, const Tensor& d_out,
                  const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& delta,
                  const ContextAttentionResult& saved, const ops::AttentionOptions& options,
                  Tensor& dq, Tensor& dkv) {
  const int p = plan.ranks;
  LONGSPAN_CHECK(saved.last_kv.defined()) << "ring backward without the forward's last keys";
  Tensor held = saved.last_kv, finished;  // finished: the sum that this rank passes on
  for (int t = 0; t < p; ++t) {
    const bool own = t == p - 1;
    Tensor next, arriving;
    if (t + 2 < p) next = ctx.Empty(held.shape(), held.dtype());
    if (t > 0) arriving = ctx.Empty(dkv.shape(), dkv.dtype());
    std::vector<Send> sends;
    std::vector<Recv> recvs;
    AddHop(sends, recvs, comm, -1, t + 2 < p ? held : Tensor(), next);
    AddHop(sends, recvs, comm, -1, finished, arriving);
    Work hop = comm.Exchange(std::move(sends), std::move(recvs));

    // The share of this stage: straight into dkv for the rank's own keys, which come last.
    const ops::BlockMask& mask = *plan.stages[static_cast<size_t>(p - 1 - t)].mask;
    Tensor share = own ? dkv : ctx.Zeros(dkv.shape(), dkv.dtype());
    if (!mask.empty()) {
      const Tensor& source = held;
      const auto kv = own ? ops::MakeKvView(k, v, mask)
                          : ops::MakeKvView(FirstHalf(source), SecondHalf(source), mask);
      const Tensor dk = FirstHalf(share), dv = SecondHalf(share);
      ops::AttentionBackward(ctx, d_out, q, kv, saved.lse, delta, mask, dq,
                             ops::MakeKvGradView(dk, dv, mask), options);
    }
    WaitTraced(ctx, hop);
    if (t > 0) ops::AddInto(ctx, share, arriving);
    finished = own ? Tensor() : share;
    if (t + 2 < p) held = next;
  }
}

}  // namespace longspan::parallel::internal
