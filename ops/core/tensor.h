#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

#include "ops/core/check.h"
#include "ops/core/device.h"
#include "ops/core/dtype.h"

namespace longspan {

// Up to four dims, each >= 0. No dims: a scalar of one element.
class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) {
    LONGSPAN_CHECK(dims.size() <= kMaxRank) << "Shape: " << dims.size() << " dims";
    for (int64_t d : dims) {
      LONGSPAN_CHECK(d >= 0) << "Shape: negative dim " << d;
      dims_[static_cast<size_t>(rank_++)] = d;
    }
  }
  int rank() const { return rank_; }
  int64_t operator[](int i) const {
    LONGSPAN_DCHECK(i >= 0 && i < rank_);
    return dims_[static_cast<size_t>(i)];
  }
  void set(int i, int64_t d) { dims_[static_cast<size_t>(i)] = d; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= dims_[static_cast<size_t>(i)];
    return n;
  }
  bool operator==(const Shape& other) const {
    if (rank_ != other.rank_) return false;
    for (int i = 0; i < rank_; ++i) {
      if ((*this)[i] != other[i]) return false;
    }
    return true;
  }
  std::string ToString() const;  // "[4096, 8, 32]"

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

class Allocator;
enum class MemoryCategory : uint8_t;

// A block of device memory that returns to its allocator with the last tensor that uses it.
class Storage {
 public:
  Storage(std::shared_ptr<Allocator> allocator, size_t bytes);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  Allocator& allocator() const { return *allocator_; }

 private:
  std::shared_ptr<Allocator> allocator_;
  const MemoryCategory category_;
  std::byte* data_;
  size_t bytes_;
};

// Handle to a contiguous row-major array. Copying a Tensor shares the memory (const does not
// protect the elements). Memory is uninitialised when made by Context::Empty. Views by row range
// keep the storage alive. A default-constructed Tensor is undefined: defined() is false.
class Tensor {
 public:
  Tensor() = default;
  Tensor(std::shared_ptr<Storage> storage, size_t offset_bytes, Shape shape, DType dtype,
         Device device)
      : storage_(std::move(storage)),
        data_(storage_->data() + offset_bytes),
        shape_(shape),
        dtype_(dtype),
        device_(device) {
    LONGSPAN_CHECK(offset_bytes + bytes() <= storage_->bytes()) << "Tensor: view past its storage";
  }

  bool defined() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int i) const { return shape_[i]; }
  int rank() const { return shape_.rank(); }
  int64_t numel() const { return shape_.numel(); }
  size_t bytes() const { return static_cast<size_t>(numel()) * SizeOf(dtype_); }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }

  std::byte* raw() const { return data_; }
  // Typed pointer; throws when T is not the tensor's dtype.
  template <class T>
  T* data() const {
    LONGSPAN_CHECK(dtype_ == DTypeOf<T>())
        << "Tensor of " << ToString(dtype_) << " read as " << ToString(DTypeOf<T>());
    return reinterpret_cast<T*>(data_);
  }

  // Copies of elements between the host and the tensor's device, whichever that is; offsets and
  // sizes in bytes. Reading waits for earlier work on the tensor. For state and tests: kernels and
  // a step's own data go through ops.
  void ReadRange(size_t offset, size_t bytes, void* to) const;
  void WriteRange(size_t offset, size_t bytes, const void* from) const;
  void ReadTo(void* to) const { ReadRange(0, bytes(), to); }
  void WriteFrom(const void* from) const { WriteRange(0, bytes(), from); }

  Tensor Rows(int64_t begin, int64_t end) const;  // view of rows [begin, end) of dim 0
  Tensor Reshape(Shape shape) const;              // same elements, another shape
  std::string Describe() const;                   // "f32[4096, 256]" for error messages
  // True when no other Tensor shares the memory, so that writing in place disturbs nobody.
  bool Unique() const { return storage_.use_count() == 1; }

 private:
  std::shared_ptr<Storage> storage_;
  std::byte* data_ = nullptr;
  Shape shape_;
  DType dtype_ = DType::kF32;
  Device device_;
};

}  // namespace longspan
