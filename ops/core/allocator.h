#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace longspan {

// Host memory for tensors: 64-byte aligned, freed blocks kept by size class so that a steady
// training step asks the system for nothing.
//
// Poisoning (`poison`) fills every block handed out with 0xff bytes (NaN in all float dtypes), so
// that a read of memory nobody wrote shows. Thread-safe.
class Allocator {
 public:
  explicit Allocator(bool poison = false) : poison_(poison) {}
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  void* Allocate(size_t bytes);
  void Free(void* data, size_t bytes) noexcept;
  void Trim();  // returns cached blocks to the system

  size_t used_bytes() const;    // handed out now
  size_t peak_bytes() const;    // high-water mark of used_bytes
  size_t cached_bytes() const;  // held for reuse

 private:
  static size_t ClassOf(size_t bytes);
  const bool poison_;
  mutable std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;  // by size class
  size_t used_bytes_ = 0, peak_bytes_ = 0, cached_bytes_ = 0;
};

}  // namespace longspan
