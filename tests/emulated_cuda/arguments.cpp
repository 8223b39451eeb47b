// Host pointers among the arguments of a kernel, which a GPU could not follow.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <mutex>
#include <set>
#include <sstream>
#include <string>

#include "tests/emulated_cuda/emulator.h"
#include "tests/emulated_cuda/memory.h"

namespace longspan::emulated {
namespace {

// Where the host's memory is not: sizes and pairs of counts are below.
constexpr uintptr_t kLowest = uintptr_t{1} << 40, kHighest = uintptr_t{1} << 47;

// Whether this process could read there.
bool IsMapped(uintptr_t address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t dash = line.find('-'), space = line.find(' ');
    const uintptr_t begin = std::stoull(line.substr(0, dash), nullptr, 16);
    const uintptr_t end = std::stoull(line.substr(dash + 1, space - dash - 1), nullptr, 16);
    if (address >= begin && address < end) return line[space + 1] == 'r';
  }
  return false;
}

// Words that are no pointers come again with every launch of a kernel.
bool IsKnownNumber(uintptr_t word, bool learn) {
  constexpr size_t kMost = 1 << 16;
  static std::mutex mutex;
  static std::set<uintptr_t>& numbers = *new std::set<uintptr_t>;
  const std::lock_guard lock(mutex);
  if (!learn) return numbers.contains(word);
  if (numbers.size() < kMost) numbers.insert(word);
  return true;
}

bool IsHostPointer(uintptr_t word, bool surely_a_pointer) {
  const auto* p = reinterpret_cast<const void*>(word);
  if (word == 0 || MayBeDevice(p)) return false;
  if (surely_a_pointer) return Locate(p, 1).place == Place::kHost;
  // A bool and the undefined bytes behind it can look like a pointer that ends in 0 or 1.
  if ((word & 0xff) <= 1) return false;
  if (word < kLowest || word >= kHighest || IsKnownNumber(word, false)) return false;
  if (Locate(p, 1).place != Place::kHost) return false;
  return IsMapped(word) || !IsKnownNumber(word, true);
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
