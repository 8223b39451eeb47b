#include "ops/core/context.h"

#include <cstring>

#include "ops/core/parallel_for.h"

namespace longspan {

Context::Context(ContextOptions options)
    : options_(options),
      allocator_(std::make_shared<Allocator>(options.poison_buffers)),
      trace_(std::make_shared<Trace>()) {
  if (options_.device.kind != DeviceKind::kCpu) {
    throw Unsupported("device CUDA is not built into this binary; use device: CPU");
  }
  if (options_.threads <= 0) options_.threads = AvailableCores();
}

Tensor Context::Empty(Shape shape, DType dtype) {
  const size_t bytes = static_cast<size_t>(shape.numel()) * SizeOf(dtype);
  return Tensor(std::make_shared<Storage>(allocator_, bytes), 0, shape, dtype, options_.device);
}

Tensor Context::Zeros(Shape shape, DType dtype) {
  Tensor t = Empty(shape, dtype);
  if (t.bytes() > 0) std::memset(t.raw(), 0, t.bytes());
  return t;
}

}  // namespace longspan
