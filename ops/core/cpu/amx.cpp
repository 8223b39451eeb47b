#include "ops/core/cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longspan {
namespace {

#if defined(__x86_64__) && defined(__linux__)
bool ProcessorHasAmx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // leaf 7, edx
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTile) != 0;
}
bool Permitted() {
  // arch/x86/include/uapi/asm/prctl.h; the kernel refuses what it does not save.
  constexpr int kRequestComponent = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestComponent, kTileData) == 0;
}
#else
bool ProcessorHasAmx() { return false; }
bool Permitted() { return false; }
#endif

}  // namespace

bool AmxUsable() {
  static const bool usable = ProcessorHasAmx() && Permitted();
  return usable;
}

}  // namespace longspan
