#pragma once
#include "ops/gemm/gemm_tiles.h"

namespace longspan::ops::internal {

// cuBLASLt on the GPU of `ctx`: bf16 or f32 operands, f32 sums without TF32. A checked problem with
// all sizes >= 1.
void RunCublasLt(Context& ctx, const GemmCall& call);

}  // namespace longspan::ops::internal
