#pragma once
#include "ops/attention/arguments.h"
#include "ops/attention/attention.h"
#include "ops/attention/cpu/bf16_kernels.h"
#include "ops/attention/cpu/block_kernels.h"
#include "ops/attention/tasks.h"

namespace longspan::ops::cpu {

// Every function does both normalizations.

// Row-wise, straight from the formula; f32, bf16 and f64.
void ReferenceForward(Context& ctx, const ForwardArgs& args);
void ReferenceBackward(Context& ctx, const BackwardArgs& args);

// 64 x 64 blocks, f32 arithmetic on f32 or bf16 operands; of softmax online.
void BlockedForward(Context& ctx, const BlockKernels& kernels, const ForwardArgs& args);
void BlockedBackward(Context& ctx, const BlockKernels& kernels, const BackwardArgs& args);

// The same blocks with bf16 operands, probabilities and score gradients, which dot product
// instructions take; f32 sums and normalization. head_dim a multiple of 8.
void Bf16Forward(Context& ctx, const Bf16Kernels& kernels, const ForwardArgs& args);
void Bf16Backward(Context& ctx, const Bf16Kernels& kernels, const BackwardArgs& args);
// Bytes of the tensors that Bf16Backward makes and its threads share.
size_t Bf16BackwardScratch(int64_t heads, int64_t head_dim, const BlockMask& mask);

#if defined(LONGSPAN_HAVE_AVX512)
// The kernels of avx512_bf16 with the products of AMX.
const Bf16Kernels& AmxKernels();
#endif
// Whether this process can run the amx part of bf16_kernels.h.
bool AmxTilesUsable();

// Largest head_dim of the blocked kernels.
inline constexpr int64_t kMaxBlockedHeadDim = 256;

}  // namespace longspan::ops::cpu
