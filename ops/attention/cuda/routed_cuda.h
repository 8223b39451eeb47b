#pragma once
#include "ops/attention/routed_arguments.h"
#include "ops/core/context.h"

// CUDA halves of router.h, routed_lists.h and routed_attention.h: operands have been checked,
// outputs allocated on ctx's GPU. f32 products of f32 or bf16 operands on the ordinary cores;
// results repeat bit for bit.
namespace longspan::ops::internal {

void BlockMeansCuda(Context& ctx, const Tensor& k, const RoutedBlocks& blocks,
                    const RoutedShare& share, const Tensor& means);
void RouteCuda(Context& ctx, const RouteArgs& args);
void BuildRoutedListsCuda(Context& ctx, const RoutedLists& lists);
void ListedBlocksCuda(Context& ctx, const RoutedLists& lists, int64_t groups, const Tensor& listed);
void RoutedForwardCuda(Context& ctx, const RoutedForwardArgs& args);
void RoutedQueryGradientCuda(Context& ctx, const RoutedBackwardArgs& args, Tensor& dq);
void RoutedKeyGradientCuda(Context& ctx, const RoutedBackwardArgs& args, const KvGradView& dkv);

}  // namespace longspan::ops::internal
