#pragma once
#include "ops/attention/arguments.h"
#include "ops/core/context.h"

// CUDA halves of attention.h: operands have been checked, outputs allocated on ctx's GPU. q, k and
// v in f32 or bf16; either normalization; results repeat bit for bit. Backward adds to dq, dk and
// dv.
namespace longspan::ops::internal {

// Largest head_dim of the kernels here.
inline constexpr int64_t kMaxCudaHeadDim = 256;

// Calls f.operator()<kNormalization>().
template <class F>
void DispatchNormalization(Normalization normalization, F&& f) {
  if (normalization == Normalization::kSigmoid) {
    f.template operator()<Normalization::kSigmoid>();
  } else {
    f.template operator()<Normalization::kSoftmax>();
  }
}

// Products in f32 on the ordinary cores: f32 mode, and the second opinion for the other.
void ReferenceCudaForward(Context& ctx, const ForwardArgs& args);
void ReferenceCudaBackward(Context& ctx, const BackwardArgs& args);

// Products of bf16 operands on tensor cores. head_dim a multiple of 8 for which a block of threads
// has the shared memory (mma_shape.h); rows of q, k, v, d_out and dq at 16 bytes.
void MmaForward(Context& ctx, const ForwardArgs& args);
void MmaBackward(Context& ctx, const BackwardArgs& args);
// Shared memory that a block of threads can have on ctx's GPU.
int64_t MmaSharedBytes(const Context& ctx);

// Returns `delta`.
Tensor AttentionDeltaCuda(Context& ctx, const Tensor& d_out, const Tensor& o, Tensor delta);
void MergePartialCuda(Context& ctx, Tensor& o, Tensor& lse, const Tensor& o2, const Tensor& lse2);

}  // namespace longspan::ops::internal
