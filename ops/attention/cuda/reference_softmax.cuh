#pragma once
#include <cmath>

#include "ops/attention/cuda/reference_tile.cuh"
#include "ops/attention/logistic.h"

// Weights of the score tiles of reference_tile.cuh: online softmax, and sigmoid.
namespace longspan::ops::reference_cuda {

// Maximum and sum over the 16 threads of a row.
__device__ inline float RowMax(float x) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}
__device__ inline float RowSum(float x) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// One step of the online softmax: scores (log2 units) become probabilities against the raised
// maximum, and what was summed before is scaled down. A row that has seen nothing keeps -inf. A NaN
// score is no maximum but reaches the sum.
template <int kDim>
__device__ void Softmax(float (&s)[kOwn][kOwn], float (&top)[kOwn], float (&sum)[kOwn],
                        Accumulator<kDim>& o) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    float highest = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
    highest = fmaxf(top[i], RowMax(highest));
    const float base = highest == -INFINITY ? 0.0f : highest;
    const float rescale = exp2f(top[i] - base);
    float added = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      s[i][j] = exp2f(s[i][j] - base);
      added += s[i][j];
    }
    sum[i] = sum[i] * rescale + RowSum(added);
    top[i] = highest;
    o.ScaleRow(i, rescale);
  }
}

// The weight of a score of sigmoid in units of log2, and its slope.
__device__ inline Logistic<float> SigmoidWeight(float t) { return LogisticOf(t, exp2f(-fabsf(t))); }

// shared.tile = s transposed: [key][query], where Accumulator::AddProduct reads it.
__device__ inline void StoreByKey(const float (&s)[kOwn][kOwn], Shared& shared) {
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    *reinterpret_cast<float4*>(shared.tile + (ThreadX() * kOwn + j) * kLd + ThreadY() * kOwn) =
        make_float4(s[0][j], s[1][j], s[2][j], s[3][j]);
  }
}

// shared.tile[query][key] = values.
__device__ inline void StoreByQuery(const float (&values)[kOwn][kOwn], Shared& shared) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    *reinterpret_cast<float4*>(shared.tile + (ThreadY() * kOwn + i) * kLd + ThreadX() * kOwn) =
        make_float4(values[i][0], values[i][1], values[i][2], values[i][3]);
  }
}

}  // namespace longspan::ops::reference_cuda
