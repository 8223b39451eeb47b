#pragma once
#include "ops/attention/cpu/block_kernels.h"
#include "ops/attention/routed_lists.h"
#include "ops/attention/router.h"
#include "ops/core/context.h"

namespace longspan::ops {

// Validated arguments of the attention to chosen blocks (moba.cpp). Shapes and dtypes: moba.h.
struct RoutedForwardArgs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const RoutedBlocks& blocks;
  const RoutedLists& lists;
  double scale;
  Tensor& o;  // o and lse: those of other keys; become those of the union
  Tensor& lse;
};
struct RoutedBackwardArgs {
  const Tensor& d_out;
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& lse;
  const Tensor& delta;
  const RoutedBlocks& blocks;
  const RoutedLists& lists;
  double scale;
  Tensor& dq;  // added to, as dk and dv
  Tensor& dk;
  Tensor& dv;
};

namespace cpu {

// Straight from the formulas; f32, bf16 and f64.
void ReferenceRoute(Context& ctx, const RouteArgs& args);
void ReferenceRoutedForward(Context& ctx, const RoutedForwardArgs& args);
void ReferenceRoutedBackward(Context& ctx, const RoutedBackwardArgs& args);

// Tiles of 64 rows, f32 arithmetic on f32 or bf16 operands.
void BlockedRoute(Context& ctx, const BlockKernels& kernels, const RouteArgs& args);
void BlockedRoutedForward(Context& ctx, const BlockKernels& kernels, const RoutedForwardArgs& args);
void BlockedRoutedBackward(Context& ctx, const BlockKernels& kernels,
                           const RoutedBackwardArgs& args);

}  // namespace cpu
}  // namespace longspan::ops
