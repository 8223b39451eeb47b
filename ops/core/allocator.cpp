#include "ops/core/allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "ops/core/error.h"

namespace longspan {
namespace {

class HostMemorySource : public MemorySource {
 public:
  // Large blocks are of huge pages where the system has them: fewer page faults when a block is
  // first written, and fewer misses of the address translation afterwards.
  void* Get(size_t bytes) override {
    constexpr size_t kHugePage = size_t{2} << 20;
    const bool large = bytes >= 2 * kHugePage;
    void* block = nullptr;
    if (posix_memalign(&block, large ? kHugePage : 64, bytes) != 0) return nullptr;
#ifdef MADV_HUGEPAGE
    if (large) madvise(block, bytes, MADV_HUGEPAGE);
#endif
    return block;
  }
  void Return(void* block) noexcept override { std::free(block); }
  void Fill(void* block, int byte, size_t bytes) override { std::memset(block, byte, bytes); }
  void ToHost(void* host, const void* block, size_t bytes) override {
    std::memcpy(host, block, bytes);
  }
  void FromHost(void* block, const void* host, size_t bytes) override {
    std::memcpy(block, host, bytes);
  }
  const char* name() const override { return "host"; }
};

}  // namespace

const char* ToString(MemoryCategory category) {
  constexpr const char* kNames[kMemoryCategories] = {"activations", "parameters",   "gradients",
                                                     "optimizer",   "workspace",    "staging",
                                                     "attention",   "communication"};
  return kNames[static_cast<size_t>(category)];
}

std::unique_ptr<MemorySource> HostMemory() { return std::make_unique<HostMemorySource>(); }

Allocator::~Allocator() { Trim(); }

// Multiples of 4 KiB up to 64 KiB, above that eighths of a power of two: at most 12.5 % is wasted
// and activations of nearly equal sizes share blocks.
size_t Allocator::BlockBytes(size_t bytes) {
  if (bytes <= 4096) return (std::max<size_t>(bytes, 1) + 63) / 64 * 64;
  const size_t step = bytes <= 65536 ? 4096 : std::bit_floor(bytes) / 8;
  return (bytes + step - 1) / step * step;
}

std::string Allocator::Usage() const {
  std::string text;
  for (size_t i = 0; i < kMemoryCategories; ++i) {
    if (used_by_[i] == 0) continue;
    text +=
        Str(text.empty() ? " (" : ", ", ToString(static_cast<MemoryCategory>(i)), " ", used_by_[i]);
  }
  return Str(used_bytes_, text.empty() ? "" : text + ")");
}

void Allocator::Count(size_t bytes, MemoryCategory category) {
  used_bytes_ += bytes;
  used_by_[static_cast<size_t>(category)] += bytes;
  largest_bytes_ = std::max(largest_bytes_, bytes);
  if (used_bytes_ <= peak_bytes_) return;
  peak_bytes_ = used_bytes_;
  peak_by_ = used_by_;
}

void* Allocator::Allocate(size_t bytes, MemoryCategory category) {
  const size_t size = BlockBytes(bytes);
  void* data = nullptr;
  {
    std::lock_guard lock(mutex_);
    auto it = free_.find(size);
    if (it != free_.end() && !it->second.empty()) {
      data = it->second.back();
      it->second.pop_back();
      cached_bytes_ -= size;
    }
    Count(size, category);
  }
  if (data == nullptr) data = source_->Get(size);
  if (data == nullptr) {
    Trim();
    data = source_->Get(size);
  }
  if (data == nullptr) {
    std::lock_guard lock(mutex_);
    used_bytes_ -= size;
    used_by_[static_cast<size_t>(category)] -= size;
    throw Error(Str("out of ", source_->name(), " memory: ", bytes, " bytes were asked for with ",
                    Usage(), " in use; use a shorter context, fewer rows, or recompute: LAYER"));
  }
  if (poison_) source_->Fill(data, 0xff, size);
  return data;
}

void Allocator::Free(void* data, size_t bytes, MemoryCategory category) noexcept {
  if (data == nullptr) return;
  const size_t size = BlockBytes(bytes);
  std::lock_guard lock(mutex_);
  used_bytes_ -= size;
  used_by_[static_cast<size_t>(category)] -= size;
  if (!kAllocatorReuses) {
    source_->Return(data);
    return;
  }
  free_[size].push_back(data);
  cached_bytes_ += size;
}

void Allocator::Trim() {
  std::lock_guard lock(mutex_);
  for (auto& [size, blocks] : free_) {
    for (void* block : blocks) source_->Return(block);
  }
  free_.clear();
  cached_bytes_ = 0;
}

size_t Allocator::used_bytes() const {
  std::lock_guard lock(mutex_);
  return used_bytes_;
}
size_t Allocator::peak_bytes() const {
  std::lock_guard lock(mutex_);
  return peak_bytes_;
}
size_t Allocator::largest_bytes() const {
  std::lock_guard lock(mutex_);
  return largest_bytes_;
}
BytesByCategory Allocator::peak_by_category() const {
  std::lock_guard lock(mutex_);
  return peak_by_;
}
MemoryCategory Allocator::category() const {
  std::lock_guard lock(mutex_);
  return category_;
}
void Allocator::SetCategory(MemoryCategory category) {
  std::lock_guard lock(mutex_);
  category_ = category;
}
size_t Allocator::cached_bytes() const {
  std::lock_guard lock(mutex_);
  return cached_bytes_;
}

}  // namespace longspan
