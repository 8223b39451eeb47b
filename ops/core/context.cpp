#include "ops/core/context.h"

#include <cstring>

#include "ops/core/cuda/backend.h"
#include "ops/core/parallel_for.h"

namespace longspan {

Context::Context(ContextOptions options) : options_(options), trace_(std::make_shared<Trace>()) {
  if (options_.device.kind == DeviceKind::kCuda) {
    runtime_ = cuda::MakeRuntime(options_.device.index, options_.sync_checks);
    trace_->AttachDevice(runtime_);
  }
  allocator_ = std::make_shared<Allocator>(
      options_.poison_buffers, runtime_ != nullptr ? cuda::DeviceMemory(runtime_) : HostMemory());
  if (options_.threads <= 0) options_.threads = AvailableCores();
}

Tensor Context::Empty(Shape shape, DType dtype) {
  const size_t bytes = static_cast<size_t>(shape.numel()) * SizeOf(dtype);
  return Tensor(std::make_shared<Storage>(allocator_, bytes), 0, shape, dtype, options_.device);
}

Tensor Context::Zeros(Shape shape, DType dtype) {
  Tensor t = Empty(shape, dtype);
  SetZero(t);
  return t;
}

void Context::SetZero(const Tensor& t) {
  LONGSPAN_CHECK(t.device() == options_.device)
      << "SetZero: a tensor on " << ToString(t.device()) << " on " << ToString(options_.device);
  if (t.bytes() == 0) return;
  if (runtime_ != nullptr) {
    cuda::Set(*runtime_, t.raw(), 0, t.bytes());
  } else {
    std::memset(t.raw(), 0, t.bytes());
  }
}

}  // namespace longspan
