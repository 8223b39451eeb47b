#include "tests/emulated_cuda/memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "tests/emulated_cuda/fiber.h"

namespace longspan::emulated {
namespace {

constexpr size_t kAlign = 256;  // of cudaMalloc
constexpr size_t kGuard = 256;  // after each block of the arena
constexpr int kGuardByte = 0xa5;
constexpr size_t kPoisonedPinned = size_t{64} << 10;  // each Runtime has megabytes of staging

size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

// One range of addresses for all device memory, without access while no stream works. Free parts
// are kept by address; the first that fits is taken.
class Arena {
 public:
  Arena() {
    void* p = mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("emulated CUDA device: address space of device memory");
      std::abort();
    }
    base_ = static_cast<std::byte*>(p);
    free_[0] = kBytes;
    if (kProtects) Watch();
  }
  void* Take(size_t bytes) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second < bytes) continue;
      const auto [offset, room] = *it;
      free_.erase(it);
      if (room > bytes) free_[offset + bytes] = room - bytes;
      if (offset + bytes > top_) Grow(offset + bytes);
      return base_ + offset;
    }
    return nullptr;
  }
  void Give(void* p, size_t bytes) {
    size_t offset = static_cast<size_t>(static_cast<std::byte*>(p) - base_);
    auto next = free_.upper_bound(offset);
    if (next != free_.end() && offset + bytes == next->first) {
      bytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        before->second += bytes;
        return;
      }
    }
    free_[offset] = bytes;
  }
  void Open() {
    if (!kProtects) return;
    const std::lock_guard lock(access_mutex_);
    if (users_++ == 0) Protect(PROT_READ | PROT_WRITE);
  }
  void Close() {
    if (!kProtects) return;
    const std::lock_guard lock(access_mutex_);
    if (--users_ == 0) Protect(PROT_NONE);
  }
  bool Holds(const void* p) const { return p >= base_ && p < base_ + kBytes; }

 private:
#if defined(LONGSPAN_ASAN) || defined(LONGSPAN_TSAN)
  static constexpr bool kProtects = false;
#else
  static constexpr bool kProtects = true;
#endif
  static constexpr size_t kBytes = size_t{1} << 38;
  static constexpr size_t kStep = size_t{1} << 24;

  void Protect(int access) {
    if (top_ > 0 && mprotect(base_, top_, access) != 0) {
      std::perror("emulated CUDA device: mprotect");
      std::abort();
    }
  }
  void Grow(size_t top) {
    const std::lock_guard lock(access_mutex_);
    const size_t old = top_;
    top_ = RoundUp(top, kStep);
    if (!kProtects || users_ > 0) {
      if (mprotect(base_ + old, top_ - old, PROT_READ | PROT_WRITE) != 0) std::abort();
    }
    madvise(base_ + old, top_ - old, MADV_HUGEPAGE);  // fewer entries to change at each opening
  }

  static void OnFault(int signal, siginfo_t* info, void*);
  static void Watch();

  std::byte* base_ = nullptr;
  size_t top_ = 0;  // below it, memory has been handed out at some time
  std::map<size_t, size_t> free_;
  std::mutex access_mutex_;
  int users_ = 0;
};

Arena& TheArena() {
  static Arena& arena = *new Arena;  // tensors may outlive static objects
  return arena;
}

struct sigaction previous_action;

void Arena::OnFault(int signal, siginfo_t* info, void*) {
  if (TheArena().Holds(info->si_addr)) {
    static constexpr char kMessage[] =
        "emulated CUDA device: host code touched device memory; copy it with cudaMemcpyAsync\n";
    static_cast<void>(!write(STDERR_FILENO, kMessage, sizeof(kMessage) - 1));
  }
  sigaction(signal, &previous_action, nullptr);  // the access is repeated and has its usual end
}

void Arena::Watch() {
  struct sigaction action {};
  action.sa_sigaction = &Arena::OnFault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_action);
}

struct Block {
  size_t bytes = 0;
  Place place = Place::kHost;
  int device = -1;
  bool retired = false, registered = false;
};

class Registry {
 public:
  static Registry& The() {
    static Registry& registry = *new Registry;
    return registry;
  }
  std::mutex mutex;
  std::map<const std::byte*, Block> blocks;
  std::map<int, MemoryUse> use;
  size_t limit = DefaultLimit();

  // The block that p lies in; blocks.end() when none does.
  std::map<const std::byte*, Block>::iterator Of(const void* p) {
    const auto* address = static_cast<const std::byte*>(p);
    auto it = blocks.upper_bound(address);
    if (it == blocks.begin()) return blocks.end();
    --it;
    const size_t room = std::max(it->second.bytes, size_t{1});
    return address < it->first + room ? it : blocks.end();
  }

 private:
  static size_t DefaultLimit() {
    const char* text = std::getenv("LONGSPAN_EMULATED_MEMORY_BYTES");
    return text != nullptr ? std::strtoull(text, nullptr, 10) : size_t{16} << 30;
  }
};

#ifdef LONGSPAN_ASAN
// From the sanitizer's heap, with its red zones.
void* Take(size_t bytes) { return std::aligned_alloc(kAlign, RoundUp(bytes, kAlign)); }
void Give(void* p, size_t) { std::free(p); }
bool GuardIsWhole(const std::byte*, size_t) { return true; }
void SetGuard(std::byte*, size_t) {}
#else
size_t ArenaBytes(size_t bytes) { return RoundUp(bytes, kAlign) + kGuard; }
void* Take(size_t bytes) { return TheArena().Take(ArenaBytes(bytes)); }
void Give(void* p, size_t bytes) { TheArena().Give(p, ArenaBytes(bytes)); }
void SetGuard(std::byte* p, size_t bytes) {
  std::memset(p + bytes, kGuardByte, ArenaBytes(bytes) - bytes);
}
bool GuardIsWhole(const std::byte* p, size_t bytes) {
  return std::all_of(p + bytes, p + ArenaBytes(bytes),
                     [](std::byte b) { return b == std::byte{kGuardByte}; });
}
#endif

}  // namespace

#ifdef LONGSPAN_ASAN
bool MayBeDevice(const void*) { return true; }
bool MustBeDevice(const void*) { return false; }
#else
bool MayBeDevice(const void* p) { return TheArena().Holds(p); }
bool MustBeDevice(const void* p) { return TheArena().Holds(p); }
#endif

DeviceAccess::DeviceAccess() { TheArena().Open(); }
DeviceAccess::~DeviceAccess() { TheArena().Close(); }

void SetMemoryLimit(size_t bytes) {
  Registry& r = Registry::The();
  const std::lock_guard lock(r.mutex);
  r.limit = bytes;
}

void* NewDeviceBlock(int device, size_t bytes) {
  Registry& r = Registry::The();
  std::byte* block = nullptr;
  {
    const std::lock_guard lock(r.mutex);
    MemoryUse& use = r.use[device];
    if (use.used + bytes > r.limit) return nullptr;
    block = static_cast<std::byte*>(Take(std::max(bytes, size_t{1})));
    if (block == nullptr) return nullptr;
    use.used += bytes;
    use.high = std::max(use.high, use.used);
    r.blocks[block] = {bytes, Place::kDevice, device};
  }
  const DeviceAccess access;
  std::memset(block, kPoisonByte, bytes);
  SetGuard(block, std::max(bytes, size_t{1}));
  return block;
}

bool RetireDeviceBlock(void* block) {
  Registry& r = Registry::The();
  const std::lock_guard lock(r.mutex);
  const auto it = r.blocks.find(static_cast<std::byte*>(block));
  if (it == r.blocks.end() || it->second.place != Place::kDevice || it->second.retired) {
    return false;
  }
  it->second.retired = true;
  return true;
}

bool ReleaseDeviceBlock(void* block) {
  Registry& r = Registry::The();
  const DeviceAccess access;
  const std::lock_guard lock(r.mutex);
  const auto it = r.blocks.find(static_cast<std::byte*>(block));
  const size_t bytes = std::max(it->second.bytes, size_t{1});
  auto* data = static_cast<std::byte*>(block);
  const bool whole = GuardIsWhole(data, bytes);
  std::memset(data, kPoisonByte, bytes);
  r.use[it->second.device].used -= it->second.bytes;
  r.blocks.erase(it);
  Give(block, bytes);
  return whole;
}

void* NewPinnedBlock(size_t bytes) {
  void* block = std::aligned_alloc(4096, RoundUp(std::max(bytes, size_t{1}), 4096));
  if (block == nullptr) return nullptr;
  std::memset(block, kPoisonByte, std::min(bytes, kPoisonedPinned));
  Registry& r = Registry::The();
  const std::lock_guard lock(r.mutex);
  r.blocks[static_cast<std::byte*>(block)] = {bytes, Place::kPinned};
  return block;
}

bool ReleasePinnedBlock(void* block) {
  {
    Registry& r = Registry::The();
    const std::lock_guard lock(r.mutex);
    const auto it = r.blocks.find(static_cast<std::byte*>(block));
    if (it == r.blocks.end() || it->second.place != Place::kPinned || it->second.registered) {
      return false;
    }
    std::memset(block, kPoisonByte, std::min(it->second.bytes, kPoisonedPinned));
    r.blocks.erase(it);
  }
  std::free(block);
  return true;
}

bool Register(void* block, size_t bytes) {
  Registry& r = Registry::The();
  const std::lock_guard lock(r.mutex);
  Block pinned{bytes, Place::kPinned};
  pinned.registered = true;
  if (r.Of(block) != r.blocks.end()) return false;
  return r.blocks.emplace(static_cast<std::byte*>(block), pinned).second;
}

bool Unregister(void* block) {
  Registry& r = Registry::The();
  const std::lock_guard lock(r.mutex);
  const auto it = r.blocks.find(static_cast<std::byte*>(block));
  if (it == r.blocks.end() || !it->second.registered) return false;
  r.blocks.erase(it);
  return true;
}

MemoryUse UseOf(int device) {
  Registry& r = Registry::The();
  const std::lock_guard lock(r.mutex);
  MemoryUse use = r.use[device];
  use.limit = r.limit;
  return use;
}

Location Locate(const void* p, size_t bytes) {
  Registry& r = Registry::The();
  const std::lock_guard lock(r.mutex);
  const auto it = r.Of(p);
  if (it == r.blocks.end()) return {};
  const auto* end = static_cast<const std::byte*>(p) + bytes;
  return {it->second.place, it->second.device, end <= it->first + it->second.bytes};
}

}  // namespace longspan::emulated
