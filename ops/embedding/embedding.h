#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Embedding lookup: y[t] = table[ids[t]].
//
// Shapes    ids [T]; table, dtable [V, D]; y, dy [T, D]
// Dtypes    ids i32; table and y f32 or bf16 (they may differ), or both f64; dy f32 or bf16 with
//           dtable f32, or both f64
// Numerics  a copy, rounded when `out` is narrower than the table; gradients of one id are added in
//           the order of its tokens, with the same bits for any number of threads
// Errors    InvalidArgument naming the token, the id and V when an id is outside [0, V), before
//           anything is written
// Devices   cpu
Tensor EmbeddingForward(Context& ctx, const Tensor& ids, const Tensor& table, DType out);

// ADDS dy[t] to dtable[ids[t]] for every t.
void EmbeddingBackward(Context& ctx, const Tensor& ids, const Tensor& dy, Tensor& dtable);

}  // namespace longspan::ops
