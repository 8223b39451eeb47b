#pragma once
#include "ops/attention/cpu/bf16_kernels.h"
#include "ops/attention/cpu/block_kernels.h"
#include "ops/attention/routed_arguments.h"
#include "ops/core/context.h"

namespace longspan::ops {

namespace cpu {

// Straight from the formulas; f32, bf16 and f64.
void ReferenceRoute(Context& ctx, const RouteArgs& args);
void ReferenceRoutedForward(Context& ctx, const RoutedForwardArgs& args);
void ReferenceRoutedQueryGradient(Context& ctx, const RoutedBackwardArgs& args, Tensor& dq);
void ReferenceRoutedKeyGradient(Context& ctx, const RoutedBackwardArgs& args,
                                const KvGradView& dkv);

// Tiles of 64 rows, f32 arithmetic on f32 or bf16 operands.
void BlockedRoute(Context& ctx, const BlockKernels& kernels, const RouteArgs& args);
void BlockedRoutedForward(Context& ctx, const BlockKernels& kernels, const RoutedForwardArgs& args);
void BlockedRoutedQueryGradient(Context& ctx, const BlockKernels& kernels,
                                const RoutedBackwardArgs& args, Tensor& dq);
void BlockedRoutedKeyGradient(Context& ctx, const BlockKernels& kernels,
                              const RoutedBackwardArgs& args, const KvGradView& dkv);

// The same with bf16 operands of every product, on bf16 problems.
void Bf16RoutedForward(Context& ctx, const Bf16Kernels& kernels, const RoutedForwardArgs& args);
void Bf16RoutedQueryGradient(Context& ctx, const Bf16Kernels& kernels,
                             const RoutedBackwardArgs& args, Tensor& dq);
void Bf16RoutedKeyGradient(Context& ctx, const Bf16Kernels& kernels, const RoutedBackwardArgs& args,
                           const KvGradView& dkv);

}  // namespace cpu
}  // namespace longspan::ops
