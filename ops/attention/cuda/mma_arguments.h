#pragma once
#include "ops/attention/cuda/device_mask.h"
#include "ops/core/cuda/backend.h"
#include "ops/core/dtype.h"

// Arguments of the tensor-core attention kernels (mma_attention.cpp fills them), and their
// launchers by padded head size.
namespace longspan::ops::mma {

// A grid runs over tasks x tiles of query heads: those of one group from first_head on.
struct TileGrid {
  unsigned tiles;
  int first_head;
};

struct ForwardProblem {
  DeviceMask mask;
  DeviceKvTable table;
  const BF16 *q, *k, *v;
  int64_t heads;     // query heads
  int group, dim;    // query heads per kv head; head size
  int q_stride, kv_stride;  // elements between tokens
  float scale_abs;   // |scale|
  float scale_log2;  // |scale| in units of log2, above 0
  bool negate;       // scale < 0
  bool o_bf16;
  void* o;
  float* lse;
};

}  // namespace longspan::ops::mma
