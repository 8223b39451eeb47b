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
  Tensor k, v;    // the buffer without the last rank's values, and without the first rank's keys
};

Gathered Split(const Tensor& buffer, int64_t local_tokens) {
  const int64_t rows = buffer.dim(0);
  return {buffer, buffer.Rows(0, rows - local_tokens), buffer.Rows(local_tokens, rows)};
}

Gathered Gather(Context& ctx, Communicator& comm, const Tensor& k, const Tensor& v) {
  TraceScope scope(ctx.trace(), "communication wait");
  const Tensor packed = PackKv(ctx, k, v).Reshape({2 * k.dim(0), k.dim(1), k.dim(2)});
  Tensor all = ctx.Empty({comm.size() * packed.dim(0), k.dim(1), k.dim(2)}, k.dtype());
  comm.AllGather(packed, all).Wait();
  return Split(all, k.dim(0));
}

}  // namespace

ContextAttentionResult AllGatherForward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                                        const Tensor& q, const Tensor& k, const Tensor& v,
                                        const ops::AttentionOptions& options) {
  const Gathered all = Gather(ctx, comm, k, v);
  const PlanStage& stage = plan.stages[0];
  ops::AttentionOptions whole = options;
  whole.round_output = true;
  const auto kv = ops::MakeKvView(all.k, all.v, *stage.mask, stage.first_rows);
  const auto r = ops::AttentionForward(ctx, q, kv, *stage.mask, whole);
  return {r.o, r.lse, {}};
}

void AllGatherBackward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                       const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& delta, const ContextAttentionResult& saved,
                       const ops::AttentionOptions& options, Tensor& dq, Tensor& dkv) {
  const Gathered all = Gather(ctx, comm, k, v);
  const PlanStage& stage = plan.stages[0];
  const ops::BlockMask& mask = *stage.mask;
  const Gathered grads = Split(ctx.Zeros(all.buffer.shape(), dkv.dtype()), k.dim(0));
  ops::AttentionBackward(ctx, d_out, q, ops::MakeKvView(all.k, all.v, mask, stage.first_rows),
                         saved.lse, delta, mask, dq,
                         ops::MakeKvGradView(grads.k, grads.v, mask, stage.first_rows), options);
  TraceScope scope(ctx.trace(), "communication wait");
  comm.ReduceScatter(grads.buffer, dkv.Reshape({2 * k.dim(0), k.dim(1), k.dim(2)})).Wait();
}

}  // namespace longspan::parallel::internal
