#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace longspan {

// Where an Allocator gets its blocks. Blocks are aligned to 64 bytes at least.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  virtual void* Get(size_t bytes) = 0;  // nullptr when there is no more
  virtual void Return(void* block) noexcept = 0;
  virtual void Fill(void* block, int byte, size_t bytes) = 0;
  virtual const char* name() const = 0;  // "host", "GPU", for messages
};
std::unique_ptr<MemorySource> HostMemory();

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

  void* Allocate(size_t bytes);
  void Free(void* data, size_t bytes) noexcept;
  void Trim();  // returns cached blocks to the source

  size_t used_bytes() const;    // handed out now
  size_t peak_bytes() const;    // high-water mark of used_bytes
  size_t cached_bytes() const;  // held for reuse

 private:
  static size_t ClassOf(size_t bytes);
  const bool poison_;
  const std::unique_ptr<MemorySource> source_;
  mutable std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;  // by size class
  size_t used_bytes_ = 0, peak_bytes_ = 0, cached_bytes_ = 0;
};

}  // namespace longspan
