#pragma once
#include "ops/embedding/embedding.h"

// CUDA halves of embedding.h: operands have been checked but for the ids, which are on the device.
namespace longspan::ops::internal {

// Host ids against the rows of the table; InvalidArgument names the first one that is outside.
void CheckIdRange(const Tensor& ids, int64_t vocab);

Tensor EmbeddingForwardCuda(Context& ctx, const Tensor& ids, const Tensor& table, Tensor y);
void EmbeddingBackwardCuda(Context& ctx, const EmbeddingOrder& order, const Tensor& dy,
                           Tensor& dtable);

}  // namespace longspan::ops::internal
