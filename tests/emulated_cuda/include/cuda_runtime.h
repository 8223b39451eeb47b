#pragma once
#include <cuda_runtime_api.h>
#include <emulated_collectives.h>
#include <emulated_maths.h>

#include <cstddef>
#include <tuple>
#include <type_traits>

// What the compiler of CUDA C++ adds to C++, for kernels that the emulated device calls as
// functions.

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// One block runs on one host thread at a time, and no other block runs on it meanwhile.
#define __shared__ static thread_local
#define __builtin_assume(condition) static_cast<void>(0)

// Of the thread that runs now.
extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;
constexpr int warpSize = 32;

namespace longspan::emulated {

// Fails the device, as a GPU does at such an access, unless p is a multiple of `bytes`.
void CheckAligned(const void* p, size_t bytes);

// Fails the device when an argument is a host pointer, or a struct with a word that points into the
// host's memory. (With AddressSanitizer the places of host and device memory are not told apart,
// and nothing is checked.)
void CheckArgument(const char* kernel, int index, const void* data, size_t bytes, bool is_pointer);
template <class T>
void CheckArgument(const char* kernel, int index, T value) {
  if constexpr (!std::is_arithmetic_v<T>) {
#if __has_builtin(__builtin_clear_padding)
    // A number and what happens to lie between it and the next member can look like a pointer.
    if constexpr (std::is_trivially_copyable_v<T>) __builtin_clear_padding(&value);
#endif
    CheckArgument(kernel, index, &value, sizeof(T), std::is_pointer_v<T>);
  }
}
template <class... P>
void CheckArguments(const char* kernel, const std::tuple<P...>& values) {
  int index = 0;
  std::apply([&](const P&... value) { (CheckArgument<P>(kernel, ++index, value), ...); }, values);
}

}  // namespace longspan::emulated

// CUDA's overloads for typed pointers.
template <class T>
cudaError_t cudaMalloc(T** block, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(block), bytes);
}
template <class T>
cudaError_t cudaMallocAsync(T** block, size_t bytes, cudaStream_t stream) {
  return cudaMallocAsync(reinterpret_cast<void**>(block), bytes, stream);
}
template <class T>
cudaError_t cudaHostAlloc(T** block, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(block), bytes, flags);
}
template <class T>
cudaError_t cudaMallocHost(T** block, size_t bytes) {
  return cudaMallocHost(reinterpret_cast<void**>(block), bytes);
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int block_threads, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      blocks, reinterpret_cast<const void*>(kernel), block_threads, shared_bytes);
}
