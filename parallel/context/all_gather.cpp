// All-gather of keys and values, one kernel over all of them, reduce-scatter of dK/dV (as in the
// Llama 3 report, arXiv 2407.21783 section 3.3.2). Keys are gathered again for the backward pass.
#include <algorithm>

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

// The block table of gathered storage: `keys` lists the blocks of rank 0, 1, ... in their order.
struct BlockTable {
  int64_t first_block, blocks;
  std::vector<int64_t> offsets;  // [kv_heads, blocks]
};

BlockTable TableOf(const ops::BlockList& keys, int64_t local_tokens, int64_t kv_heads,
                   int64_t head_dim) {
  const auto [low, high] = std::minmax_element(keys.ids.begin(), keys.ids.end());
  BlockTable table{*low, *high - *low + 1, {}};
  table.offsets.assign(static_cast<size_t>(kv_heads * table.blocks), -1);
  for (size_t i = 0; i < keys.ids.size(); ++i) {
    const int64_t token = keys.token_begin[i], rank = token / local_tokens;
    const int64_t row = token + rank * local_tokens;  // past the values of the ranks before
    const int64_t entry = keys.ids[i] - table.first_block;
    for (int64_t h = 0; h < kv_heads; ++h) {
      table.offsets[static_cast<size_t>(h * table.blocks + entry)] =
          (row * kv_heads + h) * head_dim;
    }
  }
  return table;
}

Gathered Gather(Context& ctx, Communicator& comm, const Tensor& k, const Tensor& v) {
  TraceScope scope(ctx.trace(), "communication wait");
  const Tensor packed = PackKv(ctx, k, v).Reshape({2 * k.dim(0), k.dim(1), k.dim(2)});
  Tensor all = ctx.Empty({comm.size() * packed.dim(0), k.dim(1), k.dim(2)}, k.dtype());
  comm.AllGather(packed, all).Wait();
  return Split(all, k.dim(0));
}

ops::KvView ViewOf(const Gathered& g, const ops::BlockMask& mask, int64_t local_tokens) {
  const int64_t heads = g.buffer.dim(1), dim = g.buffer.dim(2);
  BlockTable table = TableOf(mask.keys(), local_tokens, heads, dim);
  return {.k = g.k,
          .v = g.v,
          .token_stride = heads * dim,
          .kv_heads = heads,
          .head_dim = dim,
          .first_block = table.first_block,
          .blocks = table.blocks,
          .offsets = std::move(table.offsets)};
}

ops::KvGradView GradViewOf(const Gathered& g, const ops::BlockMask& mask, int64_t local_tokens) {
  const int64_t heads = g.buffer.dim(1), dim = g.buffer.dim(2);
  BlockTable table = TableOf(mask.keys(), local_tokens, heads, dim);
  return {.dk = g.k,
          .dv = g.v,
          .token_stride = heads * dim,
          .first_block = table.first_block,
          .blocks = table.blocks,
          .offsets = std::move(table.offsets)};
}

}  // namespace

ContextAttentionResult AllGatherForward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                                        const Tensor& q, const Tensor& k, const Tensor& v,
                                        const ops::AttentionOptions& options) {
  const Gathered all = Gather(ctx, comm, k, v);
  const ops::BlockMask& mask = *plan.stages[0].mask;
  ops::AttentionOptions whole = options;
  whole.round_output = true;
  const auto r = ops::AttentionForward(ctx, q, ViewOf(all, mask, k.dim(0)), mask, whole);
  return {r.o, r.lse, {}};
}

void AllGatherBackward(Context& ctx, Communicator& comm, const AttentionPlan& plan,
                       const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& delta, const ContextAttentionResult& saved,
                       const ops::AttentionOptions& options, Tensor& dq, Tensor& dkv) {
  const Gathered all = Gather(ctx, comm, k, v);
  const ops::BlockMask& mask = *plan.stages[0].mask;
  const Gathered grads = Split(ctx.Zeros(all.buffer.shape(), dkv.dtype()), k.dim(0));
  ops::AttentionBackward(ctx, d_out, q, ViewOf(all, mask, k.dim(0)), saved.lse, delta, mask, dq,
                         GradViewOf(grads, mask, k.dim(0)), options);
  TraceScope scope(ctx.trace(), "communication wait");
  comm.ReduceScatter(grads.buffer, dkv.Reshape({2 * k.dim(0), k.dim(1), k.dim(2)})).Wait();
}

}  // namespace longspan::parallel::internal
