#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Linear layer without bias: y = x w^T.
//
// Shapes    x, dx [T, K]; w, dw [N, K]; y, dy [T, N]
// Dtypes    x, w, y, dy, dx: all f32, all bf16, or all f64; dw f32 (f64 in f64 mode)
// Numerics, errors, devices: as Gemm (ops/gemm/gemm.h)
Tensor LinearForward(Context& ctx, const Tensor& x, const Tensor& w);

// ADDS dy^T x to `dw`, unless that is undefined (the weight is not trained), and returns dx = dy w,
// or an undefined tensor when `want_dx` is false (the input is not trained).
Tensor LinearBackward(Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& w, Tensor& dw,
                      bool want_dx = true);

}  // namespace longspan::ops
