#pragma once
#include <cuda_runtime.h>

#include <cstddef>

// LONGSPAN_DYNAMIC_SHARED(name): declares `std::byte* name`, the dynamic shared memory that the
// launch asked for, aligned to 128 bytes. All declarations in a kernel are the same memory.
//
// LONGSPAN_CHECK_ALIGNED(p, bytes): an access that a GPU faults at unless p is a multiple of
// `bytes` fails on the emulated device too.
#ifdef LONGSPAN_EMULATED_CUDA
#define LONGSPAN_CHECK_ALIGNED(p, bytes) ::longspan::emulated::CheckAligned(p, bytes)
#define LONGSPAN_DYNAMIC_SHARED(name) std::byte* const name = ::longspan::emulated::DynamicShared()
#else
#define LONGSPAN_CHECK_ALIGNED(p, bytes) static_cast<void>(0)
extern __shared__ __align__(128) std::byte longspan_dynamic_shared[];
#define LONGSPAN_DYNAMIC_SHARED(name) std::byte* const name = longspan_dynamic_shared
#endif
