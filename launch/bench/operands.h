#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::launch {

// Standard normal values times `scale`, rounded to the dtype: a function of (seed, index) only. On
// a GPU the first 4 Mi values are repeated.
Tensor RandomTensor(Context& ctx, Shape shape, DType dtype, uint64_t seed, double scale = 1);

// || a - b || / || b ||, computed in f64; +infinity when a value is not finite. Tensors of one
// shape and any float dtypes; b is not all zero.
double RelativeDifference(const Tensor& a, const Tensor& b);

// The largest relative difference of two right implementations on operands of `dtype`: well above
// the rounding of the narrowest numbers that a kernel keeps (for bf16: probabilities and results),
// far below what one forgotten row or block causes.
double AllowedDifference(DType dtype);

}  // namespace longspan::launch
