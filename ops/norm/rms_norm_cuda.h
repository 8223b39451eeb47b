#pragma once
#include "ops/norm/rms_norm.h"

// CUDA halves of rms_norm.h: operands have been checked, `out` allocated on ctx's GPU. w in f32.
namespace longspan::ops::internal {

RmsNormResult RmsNormForwardCuda(Context& ctx, const Tensor& x, const Tensor& w, double eps,
                                 RmsNormResult out);
Tensor RmsNormBackwardCuda(Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& w,
                           const Tensor& rstd, Tensor& dw);

}  // namespace longspan::ops::internal
