#pragma once
#include "ops/gate/duo_gate.h"

// CUDA halves of duo_gate.h: operands have been checked, outputs allocated on ctx's GPU.
namespace longspan::ops::internal {

Tensor DuoGateForwardCuda(Context& ctx, const Tensor& full, const Tensor& stream,
                          const Tensor& alpha, Tensor o);
DuoGateGradients DuoGateBackwardCuda(Context& ctx, const Tensor& d_out, const Tensor& full,
                                     const Tensor& stream, const Tensor& alpha, Tensor& dalpha,
                                     DuoGateGradients out);
void GatePenaltyForwardCuda(Context& ctx, const Tensor& alpha, const GatePenalty& penalty,
                            Tensor& sums);
void GatePenaltyBackwardCuda(Context& ctx, const Tensor& sums, const GatePenalty& penalty,
                             Tensor& dalpha);

}  // namespace longspan::ops::internal
