#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// SwiGLU gate: y = silu(gate) * up, silu(g) = g / (1 + e^-g).
//
// Shapes    all operands and results equal, any shape
// Dtypes    all f32, all bf16, or all f64
// Numerics  computed in f32 (f64 for f64), rounded once
// Errors    InvalidArgument naming the op and the operands, before any output is written
// Devices   cpu, cuda (no f64: Unsupported)
Tensor SwiGluForward(Context& ctx, const Tensor& gate, const Tensor& up);

struct SwiGluGradients {
  Tensor dgate, dup;
};
SwiGluGradients SwiGluBackward(Context& ctx, const Tensor& dy, const Tensor& gate,
                               const Tensor& up);

}  // namespace longspan::ops
