#include "ops/core/tensor.h"

#include "ops/core/allocator.h"

namespace longspan {

std::string Shape::ToString() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) text += (i ? ", " : "") + std::to_string((*this)[i]);
  return text + "]";
}

Storage::Storage(std::shared_ptr<Allocator> allocator, size_t bytes)
    : allocator_(std::move(allocator)),
      category_(allocator_->category()),
      data_(static_cast<std::byte*>(allocator_->Allocate(bytes, category_))),
      bytes_(bytes) {}

Storage::~Storage() { allocator_->Free(data_, bytes_, category_); }

void Tensor::ReadRange(size_t offset, size_t bytes, void* to) const {
  LONGSPAN_CHECK(defined() && offset + bytes <= this->bytes())
      << "Tensor::ReadRange [" << offset << ", " << offset + bytes << ") of " << Describe();
  if (bytes > 0) storage_->allocator().source().ToHost(to, data_ + offset, bytes);
}

void Tensor::WriteRange(size_t offset, size_t bytes, const void* from) const {
  LONGSPAN_CHECK(defined() && offset + bytes <= this->bytes())
      << "Tensor::WriteRange [" << offset << ", " << offset + bytes << ") of " << Describe();
  if (bytes > 0) storage_->allocator().source().FromHost(data_ + offset, from, bytes);
}

Tensor Tensor::Rows(int64_t begin, int64_t end) const {
  LONGSPAN_CHECK(defined() && rank() >= 1) << "Tensor::Rows of a scalar or undefined tensor";
  LONGSPAN_CHECK(0 <= begin && begin <= end && end <= dim(0))
      << "Tensor::Rows [" << begin << ", " << end << ") of " << Describe();
  Tensor view = *this;
  const int64_t row = dim(0) == 0 ? 0 : numel() / dim(0);
  view.data_ += static_cast<size_t>(begin * row) * SizeOf(dtype_);
  view.shape_.set(0, end - begin);
  return view;
}

Tensor Tensor::Reshape(Shape shape) const {
  LONGSPAN_CHECK(defined() && shape.numel() == numel())
      << "Tensor::Reshape " << Describe() << " to " << shape.ToString();
  Tensor view = *this;
  view.shape_ = shape;
  return view;
}

std::string Tensor::Describe() const {
  if (!defined()) return "undefined";
  return longspan::ToString(dtype_) + shape_.ToString();
}

}  // namespace longspan
