// All-gather of keys and values, one kernel over all of them, reduce-scatter of dK/dV (as in the
// Llama 3 report, arXiv 2407.21783 section 3.3.2). Keys are gathered again for the backward pass.
#include "parallel/context/internal.h"

#include "ops/elementwise/elementwise.h"

namespace longspan::parallel::internal {
namespace {

// Gathered storage is [P, 2, T, Hkv, D]. Seen as rows of one token, the keys of rank r start at row
// 2 r T and its values T rows later.
struct Gathered {
  Tensor buffer;  // [2 P T, Hkv, D]
  Tensor k, v;    // the buffer from its first key, and from its first value
};

Gathered Split(const Tensor& buffer, int64_t local_tokens) {
  return {buffer, buffer, buffer.Rows(local_tokens, buffer.dim(0))};
}

// Block `i` of the key list belongs to rank i / blocks_per_rank: shift its offset past the values of
// the ranks before it.
template <class View>
View Shift(View view, const ops::BlockList& keys, int64_t ranks, int64_t local_tokens,
           int64_t kv_heads) {
  const int64_t per_rank = keys.size() / ranks;
  for (int64_t i = 0; i < keys.size(); ++i) {
    const int64_t rank = i / per_rank;
    const int64_t entry = keys.ids[static_cast<size_t>(i)] - view.first_block;
    for (int64_t h = 0; h < kv_heads; ++h) {
      view.offsets[static_cast<size_t>(h * view.blocks + entry)] +=
          rank * local_tokens * view.token_stride;
    }
  }
  return view;
}

Gathered Gather(Context& ctx, Communicator& comm, const Tensor& k, const Tensor& v) {
  TraceScope scope(ctx.trace(), "communication wait");
  const Tensor packed = PackKv(ctx, k, v).Reshape({2 * k.dim(0), k.dim(1), k.dim(2)});
  Tensor all = ctx.Empty({comm.size() * packed.dim(0), k.dim(1), k.dim(2)}, k.dtype());
  comm.AllGather(packed, all).Wait();
  return Split(all, k.dim(0));
}

ops::KvView ViewOf(const Gathered& g, const ops::BlockMask& mask, int64_t ranks, int64_t tokens) {
  return Shift(ops::MakeKvView(g.k, g.v, mask.keys()), mask.keys(), ranks, tokens,
               g.buffer.dim(1));
}

}  // namespace

ContextAttentionResult AllGatherForward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                                        const Tensor& q, const Tensor& k, const Tensor& v,
                                        const ops::AttentionOptions& options) {
  const Gathered all = Gather(ctx, comm, k, v);
  const ops::BlockMask& mask = *plan.stages[0].mask;
  ops::AttentionOptions whole = options;
  whole.round_output = true;
  const auto r =
      ops::AttentionForward(ctx, q, ViewOf(all, mask, plan.ranks, k.dim(0)), mask, whole);
  return {r.o, r.lse, {}};
}

void AllGatherBackward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                       const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& delta, const ContextAttentionResult& saved,
                       const ops::AttentionOptions& options, Tensor& dq, Tensor& dkv) {
  const Gathered all = Gather(ctx, comm, k, v);
  const ops::BlockMask& mask = *plan.stages[0].mask;
  const Gathered grads = Split(ctx.Zeros(all.buffer.shape(), dkv.dtype()), k.dim(0));
  const auto grad_view = Shift(ops::MakeKvGradView(grads.k, grads.v, mask.keys()), mask.keys(),
                               plan.ranks, k.dim(0), k.dim(1));
  ops::AttentionBackward(ctx, d_out, q, ViewOf(all, mask, plan.ranks, k.dim(0)), saved.lse, delta,
                         mask, dq, grad_view, options);
  TraceScope scope(ctx.trace(), "communication wait");
  comm.ReduceScatter(grads.buffer, dkv.Reshape({2 * k.dim(0), k.dim(1), k.dim(2)})).Wait();
}

}  // namespace longspan::parallel::internal
