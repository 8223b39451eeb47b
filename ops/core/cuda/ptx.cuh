#pragma once

// Instructions without an equivalent in CUDA C++, for sm_80 and newer: asynchronous copies to
// shared memory, matrix fragments and products, the fast exponential and reciprocal. Addresses in
// shared memory are ordinary pointers into it, aligned to 16 bytes. Devices: GPU; the emulated
// device has a twin with the same contract.
//
// Fragments of a warp, lane = 4 * g + t with g in [0, 8) and t in [0, 4); "lo, hi" are the halves
// of a register (columns or rows n and n + 1):
//   a[0..3]  A[16 x 16], row-major: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   b0, b1   B[16 x 8]: rows 2t and 2t + 8 of column g
//   d[0..3]  D[16 x 8]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#ifdef LONGSPAN_EMULATED_CUDA
#include <emulated_ptx.h>

namespace longspan::cuda::ptx {
inline uint32_t ThreadIndexAnew() { return threadIdx.x; }
}  // namespace longspan::cuda::ptx
#else
#include <cstdint>

namespace longspan::cuda::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes; zeros when !valid, without touching `global`. Past the L1 cache: each
// tile is read once by a block.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of the copies that this thread started since the last commit.
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// All groups of this thread but the newest N are complete; other threads see them after a barrier.
template <int N>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r (16 bytes) of
// matrix m; lane 4 g + t receives elements 2t and 2t + 1 of row g of matrix m in r[m].
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// The same with each matrix transposed: lane 4 g + t receives elements g of rows 2t and 2t + 1.
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// d += a b, f32 accumulation.
__device__ __forceinline__ void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two bf16, rounded to nearest even.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// threadIdx.x, read here: what is computed from it is not kept in registers over a loop around it.
__device__ __forceinline__ uint32_t ThreadIndexAnew() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// 2^x within 2 ulp, 0 below 2^-126; 2^-inf = 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp, 0 where that is below 2^-126; infinity of what is below 2^-126.
__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace longspan::cuda::ptx
#endif
