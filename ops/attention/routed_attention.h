#pragma once
#include <memory>
#include <string>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/attention/routed_lists.h"
#include "ops/attention/router.h"

namespace longspan::ops {

// Attention to blocks that tokens choose: the parts of mixture of block attention (moba.h) that
// differ from attention under a mask. Queries are any rows with the blocks they may choose
// (RoutedQueries), keys of a block lie wherever a table by routed blocks says, so that one rank of
// several runs them with its own queries and with keys that it has received.
//
// Shapes    q, o, d_out, dq [T, Hq, D], T = queries.rows; lse, delta [T, Hq]; means [blocks, Hkv,
//           D]; kv, dkv: one kv head's keys of one block follow each other, token_stride elements
//           apart, in any order
// Dtypes    q, k, v all f32, bf16 or f64; d_out that of q or f32 (f64); everything else f32 (f64)
// Numerics  as moba.h
// Errors    InvalidArgument naming the argument, before anything is computed; Unsupported for what
//           no implementation of the device takes. Blocks that a list names must be in the table,
//           which is not checked
// Devices   cpu, cuda

// Views of plain k, v [tokens, Hkv, D] and dk, dv in which all blocks lie in order.
KvView MakeRoutedKvView(const Tensor& k, const Tensor& v, const RoutedBlocks& blocks);
KvGradView MakeRoutedKvGradView(const Tensor& dk, const Tensor& dv, const RoutedBlocks& blocks);

// For each row and query head the `width` candidates with the largest gate q . mean, i32 [Hq, T,
// width] as RoutedLists::selected. Gates that are equal go to the lower block; one that is NaN is
// the largest.
Tensor SelectBlocks(Context& ctx, const Tensor& q, const Tensor& means,
                    const RoutedQueries& queries, int64_t width,
                    const AttentionOptions& options = {});

// (o, lse), the results over other keys, become those over these and all keys of the blocks in
// `lists`.
void RoutedForward(Context& ctx, const Tensor& q, const KvView& kv, const RoutedBlocks& blocks,
                   const RoutedQueries& queries, const RoutedLists& lists, Tensor& o, Tensor& lse,
                   const AttentionOptions& options = {});

// What both gradients read. lse is the final one over all keys, delta = AttentionDelta(d_out, o).
struct RoutedBackward {
  const Tensor &d_out, &q;
  const KvView& kv;
  const Tensor &lse, &delta;
  const RoutedBlocks& blocks;
  const RoutedQueries& queries;
  const RoutedLists& lists;
};
// Add to dq, and to dk and dv of the blocks in the lists. Neither reads what the other writes.
void RoutedQueryGradient(Context& ctx, const RoutedBackward& in, Tensor& dq,
                         const AttentionOptions& options = {});
void RoutedKeyGradient(Context& ctx, const RoutedBackward& in, const KvGradView& dkv,
                       const AttentionOptions& options = {});

// For each device most specialised first, reference last:
//   amx_bf16,          gathered rows in 64 x 64 tiles, bf16 operands of every product but the gate
//   avx512_bf16
//   avx512, portable   the same in f32
//   reference          row by row; any head_dim, the only one for f64
//   reference_cuda     GPU, gathered rows in 64 x 64 tiles, f32 products, head_dim up to 256
// They accept what the entries of attention.h with their names accept.
std::vector<std::string> RoutedImplementations(DeviceKind device);

}  // namespace longspan::ops
