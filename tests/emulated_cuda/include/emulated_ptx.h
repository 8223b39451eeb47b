#pragma once
#include <cuda_runtime.h>

#include <cstdint>

// The emulated twins of ops/core/cuda/ptx.cuh, which see for the fragments. Strict where a GPU is
// silent: the destination of an asynchronous copy is NaN until its group has been waited for, whole
// warps take part in matrix operations, and shared addresses must be shared and aligned.
namespace longspan::cuda::ptx {

void CopyAsync16(void* shared, const void* global, bool valid);
void CopyAsyncCommit();
void CopyAsyncWaitNewest(int groups);
template <int N>
void CopyAsyncWait() {
  static_assert(N >= 0);
  CopyAsyncWaitNewest(N);
}
void LoadMatrix4(uint32_t (&r)[4], const void* row);
void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row);
void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t PackBf16(float low, float high);
float Exp2(float x);
float Reciprocal(float x);

}  // namespace longspan::cuda::ptx
