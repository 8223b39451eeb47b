#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace longspan {

// Where an Allocator gets its blocks. Blocks are aligned to 64 bytes at least.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  virtual void* Get(size_t bytes) = 0;  // nullptr when there is no more
  virtual void Return(void* block) noexcept = 0;
  virtual void Fill(void* block, int byte, size_t bytes) = 0;
  // Copies between blocks and the host. ToHost waits for all earlier work on the block; FromHost
  // acts before all later work, and the host may change its bytes when it returns.
  virtual void ToHost(void* host, const void* block, size_t bytes) = 0;
  virtual void FromHost(void* block, const void* host, size_t bytes) = 0;
  virtual const char* name() const = 0;  // "host", "GPU", for messages
};
std::unique_ptr<MemorySource> HostMemory();

// What memory is used for, in reports. Activations are also what has no other name: whatever a
// step makes and drops.
enum class MemoryCategory : uint8_t {
  kActivations,
  kParameters,  // weights as stored and as used
  kGradients,
  kOptimizer,  // its state: moments
  kWorkspace,  // scratch that libraries and kernels keep
  kStaging,    // batches
  kAttention,  // what attention's forward pass makes, and keeps for its backward pass
  // What is sent and received: keys, values and their gradients. Communicators keep memory of their
  // own besides, which is not counted.
  kCommunication,
};
inline constexpr size_t kMemoryCategories = 8;
const char* ToString(MemoryCategory category);  // "activations", ...
using BytesByCategory = std::array<size_t, kMemoryCategories>;

// false under AddressSanitizer, from which reuse would hide use-after-free and overflow: every
// allocation is then one of the source.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAllocatorReuses = false;
#else
inline constexpr bool kAllocatorReuses = true;
#endif

// Memory for tensors: freed blocks are kept by size class, so that a steady training step asks the
// source for nothing. On a GPU a block may be handed out again while kernels that used it still
// run: all work of a Context is on one stream, and other streams hold a reference until they are
// done.
//
// Poisoning (`poison`) fills every block handed out with 0xff bytes (NaN in all float dtypes), so
// that a read of memory nobody wrote shows. Thread-safe.
class Allocator {
 public:
  explicit Allocator(bool poison = false, std::unique_ptr<MemorySource> source = HostMemory())
      : poison_(poison), source_(std::move(source)) {}
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  // Freed with the same category.
  void* Allocate(size_t bytes, MemoryCategory category = MemoryCategory::kActivations);
  void Free(void* data, size_t bytes,
            MemoryCategory category = MemoryCategory::kActivations) noexcept;
  void Trim();  // returns cached blocks to the source
  // What `bytes` take: blocks have sizes at most 12.5 % apart, so that they can be used again.
  static size_t BlockBytes(size_t bytes);

  size_t used_bytes() const;     // handed out now
  size_t peak_bytes() const;     // high-water mark of used_bytes
  size_t cached_bytes() const;   // held for reuse
  size_t largest_bytes() const;  // of the largest block handed out so far
  // What peak_bytes consisted of when it was reached; adds up to it.
  BytesByCategory peak_by_category() const;

  // What tensors made from now on are for; see MemoryScope.
  MemoryCategory category() const;
  void SetCategory(MemoryCategory category);
  MemorySource& source() { return *source_; }

 private:
  void Count(size_t bytes, MemoryCategory category);  // called with the lock held
  std::string Usage() const;                          // for messages; called with the lock held
  const bool poison_;
  const std::unique_ptr<MemorySource> source_;
  mutable std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;  // by size class
  size_t used_bytes_ = 0, peak_bytes_ = 0, cached_bytes_ = 0, largest_bytes_ = 0;
  BytesByCategory used_by_{}, peak_by_{};
  MemoryCategory category_ = MemoryCategory::kActivations;
};

// While alive, tensors that are made of `allocator` count as `category`.
class MemoryScope {
 public:
  MemoryScope(Allocator& allocator, MemoryCategory category)
      : allocator_(allocator), former_(allocator.category()) {
    allocator_.SetCategory(category);
  }
  ~MemoryScope() { allocator_.SetCategory(former_); }
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;

 private:
  Allocator& allocator_;
  const MemoryCategory former_;
};

}  // namespace longspan
