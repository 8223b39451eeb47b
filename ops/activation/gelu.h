#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// GELU in the tanh form of GPT-2: y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
//
// Shapes    x, y, dy, dx equal, any shape
// Dtypes    all f32, all bf16, or all f64
// Numerics  computed in f32 (f64 for f64), rounded once
// Errors    InvalidArgument naming the op and the operands, before any output is written
// Devices   cpu, cuda (no f64: Unsupported)
Tensor GeluForward(Context& ctx, const Tensor& x);
Tensor GeluBackward(Context& ctx, const Tensor& dy, const Tensor& x);  // returns dx

}  // namespace longspan::ops
