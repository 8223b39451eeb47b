#pragma once
#include "ops/loss/hidden_distance.h"

// CUDA halves of hidden_distance.h: operands have been checked, outputs allocated on ctx's GPU.
namespace longspan::ops::internal {

Tensor HiddenDistanceForwardCuda(Context& ctx, const Tensor& x, const Tensor& target,
                                 const Tensor& labels, Tensor sums);
Tensor HiddenDistanceBackwardCuda(Context& ctx, const Tensor& x, const Tensor& target,
                                  const Tensor& labels, double scale, Tensor dx);

}  // namespace longspan::ops::internal
