#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "ops/elementwise/cpu/row_kernels.h"
#include "tests/support/numeric.h"

// What the tests of row kernels share.
namespace longspan::test {

using ops::RowKernels;
using ops::RowKernelSet;

// Not representable in bf16, where it is 12352: compare bits.
inline constexpr float kGuard = 12345.0f;

inline std::vector<const RowKernelSet*> Sets() {
  const auto& all = ops::internal::AvailableRowKernels();
  return {all.sets, all.sets + all.count};
}

template <class T>
const RowKernels<T>& TableOf(const RowKernelSet& set, bool streaming = false) {
  if constexpr (std::is_same_v<T, float>) {
    return streaming ? set.f32_streaming : set.f32;
  } else {
    return streaming ? set.bf16_streaming : set.bf16;
  }
}
inline std::string NameOf(const RowKernelSet& set, bool streaming) {
  return Str(set.name, streaming ? " streaming" : "");
}

// n elements that begin `shift` after a multiple of 64 bytes, with guards on both sides. No vector
// is aligned where `shift` is odd.
template <class T>
class Row {
 public:
  explicit Row(int64_t n, int64_t shift = 1)
      : size_(static_cast<size_t>(n)), data_(size_ + 96, T(kGuard)) {
    const size_t past = reinterpret_cast<uintptr_t>(data_.data() + 16) % 64;
    begin_ = 16 + (64 - past) % 64 / sizeof(T) + static_cast<size_t>(shift);
  }
  explicit Row(const Vec& values, int64_t shift = 1)
      : Row(static_cast<int64_t>(values.size()), shift) {
    for (size_t i = 0; i < values.size(); ++i) data()[i] = T(static_cast<float>(values[i]));
  }
  Row(const Row&) = delete;
  Row& operator=(const Row&) = delete;
  T* data() { return data_.data() + begin_; }
  Vec values() const {
    Vec v;
    for (size_t i = 0; i < size_; ++i) v.push_back(static_cast<float>(data_[begin_ + i]));
    return v;
  }
  std::vector<uint32_t> bits() const {
    std::vector<uint32_t> b(size_);
    for (size_t i = 0; i < size_; ++i) std::memcpy(&b[i], &data_[begin_ + i], sizeof(T));
    return b;
  }
  bool GuardsHold() const {
    const T guard(kGuard);
    for (size_t i = 0; i < data_.size(); ++i) {
      const bool inside = i >= begin_ && i < begin_ + size_;
      if (!inside && std::memcmp(&data_[i], &guard, sizeof guard) != 0) return false;
    }
    return true;
  }

 private:
  const size_t size_;
  std::vector<T> data_;
  size_t begin_;
};

template <class T>
inline constexpr DType kTypeOf = std::is_same_v<T, float> ? DType::kF32 : DType::kBF16;

}  // namespace longspan::test
