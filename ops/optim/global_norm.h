#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Sums over all elements of a tensor, ADDED to the f64[1] `total` on the device of `ctx`: a step
// adds up its buckets there and never asks for the value. Fixed runs of the tensor are summed in
// parallel and added in a fixed order, so the bits depend on the tensor and the device only.
//
// Dtypes    f32, bf16, f64 (not on a GPU: Unsupported); any shape, empty adds 0
// Errors    InvalidArgument naming `total` unless it is f64[1]
// Devices   cpu, cuda

// Sum of squares, in f64; what a rank contributes to the global gradient norm. A NaN or infinity
// among the elements makes the total not finite (f32 and bf16: exactly then, because their squares
// cannot overflow f64).
void AddSumOfSquares(Context& ctx, const Tensor& t, Tensor& total);

// Number of elements that are NaN or infinite.
void AddNotFinite(Context& ctx, const Tensor& t, Tensor& total);

}  // namespace longspan::ops
