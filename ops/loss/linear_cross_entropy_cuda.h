#pragma once
#include "ops/loss/linear_cross_entropy.h"

// What the two halves of linear_cross_entropy.h share, and the CUDA half: operands have been
// checked but for the labels, which are on the device.
namespace longspan::ops::internal {

constexpr int32_t kNoLabel = -1;

int64_t ChunkTokens(const Context& ctx, int64_t vocab, const LinearCrossEntropyOptions& options);
// Memory for the largest chunk, as [tokens, vocab].
Tensor ChunkBuffer(Context& ctx, int64_t tokens, int64_t vocab,
                   const LinearCrossEntropyOptions& options, DType dtype);

// `losses` and the tensors of `result` are zero.
LinearCrossEntropyResult LinearCrossEntropyForwardCuda(Context& ctx, const Tensor& x,
                                                       const Tensor& w, const Tensor& labels,
                                                       const LinearCrossEntropyOptions& options,
                                                       Tensor losses,
                                                       LinearCrossEntropyResult result);
Tensor LinearCrossEntropyBackwardCuda(Context& ctx, const LinearCrossEntropyResult& saved,
                                      const Tensor& x, const Tensor& w, const Tensor& labels,
                                      const LinearCrossEntropyOptions& options, double scale,
                                      Tensor& dw);

}  // namespace longspan::ops::internal
