#pragma once
#include <cstdint>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Embedding lookup: y[t] = table[ids[t]].
//
// Shapes    ids [T]; table, dtable [V, D]; y, dy [T, D]
// Dtypes    ids i32; table and y f32 or bf16 (they may differ), or both f64; dy f32 or bf16 with
//           dtable f32, or both f64; on a GPU no f64
// Numerics  a copy, rounded when `out` is narrower than the table; gradients of one id are added in
//           f32 in an order that the ids decide (on a CPU that of the tokens), with the same bits
//           for any number of threads
// Errors    InvalidArgument naming the token, the id and V when an id is outside [0, V), before
//           anything is written. On a GPU ids cannot be looked at: the lookup gives a row of NaN
//           for such an id, and the backward pass takes them from an order made on the host
// Devices   cpu, cuda
Tensor EmbeddingForward(Context& ctx, const Tensor& ids, const Tensor& table, DType out);

// Which tokens have the same id: what the backward pass on a GPU needs to add in a fixed order
// without sorting there. The tokens, sorted by id and then by position, are cut into pieces of one
// id and at most kPieceTokens each.
struct EmbeddingOrder {
  static constexpr int64_t kPieceTokens = 32;
  Tensor tokens;      // i32 [T], in sorted order
  Tensor pieces;      // i32 [pieces, 3]: begin and end in `tokens`, and where the sum goes: a row
                      // of the table, or -1 - s for slot s of a partial sum
  Tensor joins;       // i32 [joins, 3]: row of the table, first slot, slots; for ids of more than
                      // one piece
  int64_t slots = 0;  // of partial sums
  int64_t vocab = 0;  // rows of the table
};

// The order of the ids [T] (host memory) of a table with `vocab` rows; its tensors are made by
// `ctx` in host memory and are copied to the GPU as they are.
//
// Errors    InvalidArgument naming the token, the id and `vocab`, as EmbeddingForward
EmbeddingOrder OrderTokens(Context& ctx, const Tensor& ids, int64_t vocab);

// ADDS dy[t] to dtable[ids[t]] for every t. `order`: of these ids, on the device of `ctx`; needed
// on a GPU and not looked at on a CPU.
void EmbeddingBackward(Context& ctx, const Tensor& ids, const Tensor& dy, Tensor& dtable,
                       const EmbeddingOrder& order = {});

}  // namespace longspan::ops
