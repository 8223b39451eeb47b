#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Sum of the squares of all elements, in f64; what a rank contributes to the global gradient norm.
// Fixed runs of the tensor are summed in parallel and added in order, so the bits depend on the
// tensor only. A NaN or infinity among the elements makes the result not finite (f32 and bf16:
// exactly then, because their squares cannot overflow f64).
//
// Dtypes    f32, bf16, f64; any shape, empty gives 0
// Devices   cpu
double SumOfSquares(Context& ctx, const Tensor& t);

// True when no element is NaN or infinite.
bool AllFinite(Context& ctx, const Tensor& t);

}  // namespace longspan::ops
