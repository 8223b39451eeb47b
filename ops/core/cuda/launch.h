#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "ops/core/cuda/runtime.h"

namespace longspan::cuda {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;        // dynamic shared memory
  cudaStream_t stream = nullptr;  // null: the runtime's compute stream
};

// `blocks` as an extent of a grid: the largest along x on any device is 2^31 - 1.
// Errors: InvalidArgument for more, and for less than 0.
unsigned GridSize(int64_t blocks);

// Blocks of `threads` that cover n elements, `each` per thread.
inline LaunchShape Cover(int64_t n, int threads = 256, int64_t each = 1) {
  const int64_t per_block = threads * each;
  return {dim3(GridSize((n + per_block - 1) / per_block)), dim3(static_cast<unsigned>(threads))};
}

namespace internal {
// Checks the shape against the device, raises the kernel's limit of dynamic shared memory where
// needed, launches, and with sync_checks waits. `name` is for messages.
void LaunchChecked(Runtime& runtime, const char* name, const void* kernel, LaunchShape shape,
                   void** arguments);
}  // namespace internal

// The only way kernels are started. An empty grid is nothing to do. Arguments are converted to the
// kernel's parameter types.
//
// Errors: InvalidArgument when the shape is beyond the device's limits; CudaError for a launch that
// failed, and with sync_checks for a kernel that did.
template <class... P, class... A>
void Launch(Runtime& runtime, const char* name, void (*kernel)(P...), const LaunchShape& shape,
            A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  std::tuple<std::decay_t<P>...> values(std::forward<A>(arguments)...);
#ifdef LONGSPAN_EMULATED_CUDA
  emulated::CheckArguments(name, values);
  EmulatedKernel bound{name, [kernel, values] { std::apply(kernel, values); }};
  void* pointers[] = {&bound};
  internal::LaunchChecked(runtime, name, reinterpret_cast<const void*>(kernel), shape, pointers);
#else
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
        internal::LaunchChecked(runtime, name, reinterpret_cast<const void*>(kernel), shape,
                                pointers);
      },
      values);
#endif
}

}  // namespace longspan::cuda
