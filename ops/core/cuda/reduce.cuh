#pragma once
#include <cuda_runtime.h>

// Sums and maxima over threads whose order depends on the block's size alone, so that results
// repeat.
namespace longspan::cuda {

constexpr int kWarp = 32;

__device__ inline float WarpSum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}
__device__ inline double WarpSum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over all threads of a block of kThreads (a multiple of 32), on every thread. All threads
// of the block call it; it ends with the shared memory free for the next call.
template <int kThreads, class T>
__device__ T BlockSum(T value) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T sums[kWarps];
  value = WarpSum(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  __syncthreads();
  return total;
}

// The largest over all threads of a block, which is not NaN unless all are; as BlockSum otherwise.
template <int kThreads>
__device__ float BlockMax(float value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ float largest[kWarps];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (threadIdx.x % kWarp == 0) largest[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = largest[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) value = fmaxf(value, largest[w]);
  __syncthreads();
  return value;
}

}  // namespace longspan::cuda
