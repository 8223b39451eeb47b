#pragma once
#include <cstdint>
#include <vector>

#include "ops/embedding/embedding.h"

// What the files of embedding.h share, and its CUDA halves: operands have been checked but for the
// ids, which are on the device.
namespace longspan::ops::internal {

// Host ids against the rows of the table; InvalidArgument names the first one that is outside.
void CheckIdRange(const Tensor& ids, int64_t vocab);

// The tokens ordered by id, those of one id in their own order. The ids are in host memory and in
// [0, vocab).
std::vector<int32_t> TokensById(const Tensor& ids, int64_t vocab);

Tensor EmbeddingForwardCuda(Context& ctx, const Tensor& ids, const Tensor& table, Tensor y);
void EmbeddingBackwardCuda(Context& ctx, const EmbeddingOrder& order, const Tensor& dy,
                           Tensor& dtable);

}  // namespace longspan::ops::internal
