#pragma once
#include "ops/core/context.h"

// LONGSPAN_ON_CUDA(ctx, XCuda(ctx, ...)): returns what the call gives when `ctx` is on a GPU.
// Stands in an op after its checks. Binaries without CUDA have no such Context, and no such
// function.
#ifdef LONGSPAN_WITH_CUDA
#define LONGSPAN_ON_CUDA(ctx, call) \
  if ((ctx).device().kind == ::longspan::DeviceKind::kCuda) return call
#else
#define LONGSPAN_ON_CUDA(ctx, call) static_cast<void>(0)
#endif
