#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Elementwise helpers of the training step over tensors of any shape.
//
// Dtypes    f32, bf16 and f64. f32 and bf16 mix freely where two operands meet; f64 meets only
//           f64, except in Cast and CastInto. On a GPU f64 only in AddInto (Unsupported elsewhere).
// Numerics  computed in f32 (f64 for f64), rounded once when stored.
// Errors    InvalidArgument naming the op and the shapes or dtypes, before anything is written.
// Devices   cpu, cuda

// dst += src, in place; same shape.
void AddInto(Context& ctx, Tensor& dst, const Tensor& src);

// a + b in the dtype of `a`, a new tensor; same shape. Also the residual add: with an f32 stream
// `a` and a bf16 branch `b` the stream stays f32.
Tensor Add(Context& ctx, const Tensor& a, const Tensor& b);
inline Tensor ResidualAdd(Context& ctx, const Tensor& stream, const Tensor& branch) {
  return Add(ctx, stream, branch);
}

// t *= factor, in place.
void Scale(Context& ctx, Tensor& t, double factor);

// Every element of `t` below `low` becomes `low`, every one above `high` becomes `high`, in place;
// NaN stays.
void Clamp(Context& ctx, Tensor& t, double low, double high);

// Every element of `t` becomes `value`.
void Fill(Context& ctx, Tensor& t, double value);

// Conversion between any two float dtypes (f64 to bf16 rounds to f32 on the way). Cast returns a
// new tensor also when the dtype stays the same; CastInto needs equal shapes.
Tensor Cast(Context& ctx, const Tensor& t, DType dtype);
void CastInto(Context& ctx, const Tensor& src, Tensor& dst);

// dst[d] += rows[0][d] + rows[1][d] + ... in that order (on a GPU in another one, fixed by P); rows
// [P, D] and dst [D], both f32 or both f64. Folds the partial sums that kernels keep per fixed
// range of tokens.
void AddRowsInto(Context& ctx, Tensor& dst, const Tensor& rows);

}  // namespace longspan::ops
