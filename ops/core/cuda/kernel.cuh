#pragma once
#include <cuda_runtime.h>

#include <cstddef>

// LONGSPAN_DYNAMIC_SHARED(name): declares `std::byte* name`, the dynamic shared memory that the
// launch asked for, aligned to 128 bytes. All declarations in a kernel are the same memory.
#ifdef LONGSPAN_EMULATED_CUDA
#define LONGSPAN_DYNAMIC_SHARED(name) std::byte* const name = ::longspan::emulated::DynamicShared()
#else
extern __shared__ __align__(128) std::byte longspan_dynamic_shared[];
#define LONGSPAN_DYNAMIC_SHARED(name) std::byte* const name = longspan_dynamic_shared
#endif
