#pragma once
#include "ops/rope/rope.h"

// CUDA half of rope.h: operands have been checked, y allocated on ctx's GPU.
namespace longspan::ops::internal {

// direction 1 turns by the table's angle, -1 back.
Tensor RotateCuda(Context& ctx, const char* op, const Tensor& x, const RopeTable& table,
                  int direction, Tensor y);

}  // namespace longspan::ops::internal
