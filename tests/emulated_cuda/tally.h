#pragma once
#include <atomic>
#include <string>

#include "tests/emulated_cuda/emulator.h"

namespace longspan::emulated {

struct Tally {
  std::atomic<uint64_t> launches{0}, allocations{0}, host_allocations{0}, copies{0};
  std::atomic<uint64_t> host_waits{0}, blocking_copies{0};
};
Tally& TheTally();
void CountLaunch(const char* kernel);

// Whether a test asked this call to fail.
bool TakeFault(Fault fault);
void EndFailure();

}  // namespace longspan::emulated
