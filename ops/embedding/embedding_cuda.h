#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

// CUDA halves of embedding.h: operands have been checked but for the ids, which are on the device.
// The loader has compared them with the vocabulary; an id outside it would give a row of NaN.
namespace longspan::ops::internal {

Tensor EmbeddingForwardCuda(Context& ctx, const Tensor& ids, const Tensor& table, Tensor y);
void EmbeddingBackwardCuda(Context& ctx, const Tensor& ids, const Tensor& dy, Tensor& dtable);

}  // namespace longspan::ops::internal
