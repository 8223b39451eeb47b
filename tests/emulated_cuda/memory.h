#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "tests/emulated_cuda/emulator.h"

// Device and pinned memory of the emulated devices.
namespace longspan::emulated {

constexpr int kPoisonByte = 0xff;

// Null when the device's limit is reached. Filled with poison.
void* NewDeviceBlock(int device, size_t bytes);
// False when `block` is not the beginning of one, or was retired already. From now on the block
// does not count as used; its memory stays until it is released.
bool RetireDeviceBlock(void* block);
// Poisons and frees. Returns false when bytes beyond the block's end were written.
bool ReleaseDeviceBlock(void* block);

void* NewPinnedBlock(size_t bytes);
bool ReleasePinnedBlock(void* block);
bool Register(void* block, size_t bytes);  // makes ordinary memory count as pinned
bool Unregister(void* block);

// What the address alone says: not known with AddressSanitizer, whose heap holds all memory.
bool MayBeDevice(const void* p);
bool MustBeDevice(const void* p);

struct MemoryUse {
  size_t used = 0, high = 0, limit = 0;
};
MemoryUse UseOf(int device);

}  // namespace longspan::emulated
