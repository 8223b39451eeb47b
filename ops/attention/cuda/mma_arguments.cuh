#pragma once
#include <cuda_runtime.h>

#include "ops/attention/attention.h"
#include "ops/attention/cuda/device_mask.h"
#include "ops/core/cuda/backend.h"
#include "ops/core/dtype.h"

// Arguments of the tensor-core attention kernels (mma_attention.cpp fills them), and their
// launchers by padded head size.
namespace longspan::ops::mma {

inline constexpr Normalization kSoftmax = Normalization::kSoftmax,
                               kSigmoid = Normalization::kSigmoid;

// A grid runs over tasks x tiles of query heads: those of one group from first_head on.
struct TileGrid {
  unsigned tiles;
  int first_head;
};

struct ForwardProblem {
  DeviceMask mask;
  DeviceKvTable table;
  const BF16 *q, *k, *v;
  int64_t heads;            // query heads
  int group, dim;           // query heads per kv head; head size
  int q_stride, kv_stride;  // elements between tokens
  float scale_log2;         // |scale| in units of log2, above 0
  float bias_log2;          // of sigmoid
  bool negate;              // scale < 0
  bool o_bf16;
  void* o;
  float* lse;  // of softmax
};

struct BackwardProblem {
  DeviceMask mask;
  DeviceKvTable table, gradient_table;
  const BF16 *q, *k, *v, *d_out;
  // Per query head and row of q: {lse in units of log2, +inf for a row that sees nothing; delta -
  // dlse}. Heads are statistics_stride apart, an even number with two elements to spare. Of
  // softmax.
  const float2* statistics;
  int64_t statistics_stride;
  int64_t heads;
  int group, dim;
  int q_stride, kv_stride;  // elements between tokens
  float scale, scale_log2;
  float bias_log2;  // of sigmoid
  float *dq, *dk, *dv;
};

// Defined in mma_forward*.cu, mma_query_gradient*.cu and mma_key_gradient*.cu for the head sizes of
// kPaddedDims; kHeads = 2 up to 128.
template <int kDim, int kHeads, Normalization>
void LaunchForward(cuda::Runtime& runtime, const ForwardProblem& problem, const TileGrid& grid);
template <int kDim, int kHeads, Normalization>
void LaunchQueryGradient(cuda::Runtime& runtime, const BackwardProblem& problem,
                         const TileGrid& grid);
template <int kDim, Normalization>
void LaunchKeyGradient(cuda::Runtime& runtime, const BackwardProblem& problem);

}  // namespace longspan::ops::mma
