#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// RMSNorm over the last dimension: y = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps).
//
// Shapes    x, y, dy, dx [T, D];  w, dw [D];  rstd [T]
// Dtypes    x, y, dy, dx: all f32 or all bf16, with w f32 or bf16 and rstd, dw f32; or all f64
// Layout    contiguous; T >= 0, D >= 1; eps > 0 in the dtype of rstd (added to a mean square)
// Numerics  computed in the dtype of rstd, one rounding on store; same bits for any number of
//           threads. Finite f32 and bf16 rows give finite results also where their sum of squares
//           overflows f32
// Errors    InvalidArgument naming the op and the argument, before any output is written
// Devices   cpu, cuda (no f64: Unsupported)
struct RmsNormResult {
  Tensor y;     // [T, D]
  Tensor rstd;  // [T], saved for the backward pass
};
RmsNormResult RmsNormForward(Context& ctx, const Tensor& x, const Tensor& w, double eps);

// Returns dx (overwritten) and ADDS the weight gradient into `dw`, so that micro-batches
// accumulate without a temporary; an undefined `dw` means that none is wanted. `rstd` must come
// from RmsNormForward on the same x and eps.
Tensor RmsNormBackward(Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& w,
                       const Tensor& rstd, Tensor& dw);

}  // namespace longspan::ops
