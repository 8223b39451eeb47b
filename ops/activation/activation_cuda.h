#pragma once
#include "ops/activation/swiglu.h"

// CUDA halves of swiglu.h and gelu.h: operands have been checked, outputs allocated on ctx's GPU.
namespace longspan::ops::internal {

Tensor SwiGluForwardCuda(Context& ctx, const Tensor& gate, const Tensor& up, Tensor y);
SwiGluGradients SwiGluBackwardCuda(Context& ctx, const Tensor& dy, const Tensor& gate,
                                   const Tensor& up, SwiGluGradients out);
Tensor GeluForwardCuda(Context& ctx, const Tensor& x, Tensor y);
Tensor GeluBackwardCuda(Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx);

}  // namespace longspan::ops::internal
