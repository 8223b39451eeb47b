#pragma once
#include "ops/core/context.h"

// LONGSPAN_ON_CUDA(ctx, XCuda(ctx, ...)): returns what the call gives when `ctx` is on a GPU.
// Stands in an op after its checks and allocations.
#define LONGSPAN_ON_CUDA(ctx, call) \
  if ((ctx).device().kind == ::longspan::DeviceKind::kCuda) return call
