// Host pointers among the arguments of a kernel, which a GPU could not follow.
#include <cuda_runtime.h>
#include <pthread.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/emulated_cuda/emulator.h"
#include "tests/emulated_cuda/memory.h"

namespace longspan::emulated {
namespace {

struct Range {
  uintptr_t begin = 0, end = 0;
  bool Holds(uintptr_t p) const { return p >= begin && p < end; }
};

Range StackOfThread() {
  Range range;
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return range;
  void* low = nullptr;
  size_t bytes = 0;
  if (pthread_attr_getstack(&attributes, &low, &bytes) == 0) {
    range = {reinterpret_cast<uintptr_t>(low), reinterpret_cast<uintptr_t>(low) + bytes};
  }
  pthread_attr_destroy(&attributes);
  return range;
}

uintptr_t HeapBegin() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("[heap]") == std::string::npos) continue;
    return std::stoull(line.substr(0, line.find('-')), nullptr, 16);
  }
  return UINTPTR_MAX;
}

bool IsHostPointer(uintptr_t word, bool surely_a_pointer) {
  const auto* p = reinterpret_cast<const void*>(word);
  if (word == 0 || MayBeDevice(p)) return false;
  if (!surely_a_pointer) {
    static const uintptr_t heap = HeapBegin();
    thread_local const Range stack = StackOfThread();
    const Range heap_now{heap, reinterpret_cast<uintptr_t>(sbrk(0))};
    if (!stack.Holds(word) && !heap_now.Holds(word)) return false;
  }
  return Locate(p, 1).place == Place::kHost;
}

}  // namespace

void CheckArgument(const char* kernel, int index, const void* data, size_t bytes, bool is_pointer) {
  for (size_t at = 0; at + sizeof(uintptr_t) <= bytes; at += sizeof(uintptr_t)) {
    uintptr_t word = 0;
    std::memcpy(&word, static_cast<const std::byte*>(data) + at, sizeof word);
    if (!IsHostPointer(word, is_pointer)) continue;
    std::ostringstream why;
    why << "kernel " << kernel << ": argument " << index;
    if (!is_pointer) why << ", at byte " << at << " of " << bytes << ",";
    why << " is a pointer to host memory";
    FailDevice(why.str());
    return;
  }
}

}  // namespace longspan::emulated
