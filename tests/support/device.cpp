#include "tests/support/device.h"

#include <cstring>
#include <vector>

#include "ops/core/cuda/backend.h"
#include "tests/support/device_flag.h"

namespace longspan::test {
namespace {

Device test_device;

bool IsOnHost(const Tensor& t) { return t.device().kind == DeviceKind::kCpu; }

}  // namespace

namespace internal {
void SetTestDevice(Device device) { test_device = device; }
}  // namespace internal

Device TestDevice() { return test_device; }

void CopyToHost(const Tensor& from, void* to) {
  if (from.bytes() == 0) return;
  if (IsOnHost(from)) {
    std::memcpy(to, from.raw(), from.bytes());
  } else {
    cuda::DownloadAfterAll(from.device().index, to, from.raw(), from.bytes());
  }
}

void CopyFromHost(Context& ctx, const void* from, const Tensor& to) {
  if (to.bytes() == 0) return;
  if (IsOnHost(to)) {
    std::memcpy(to.raw(), from, to.bytes());
  } else {
    cuda::Upload(ctx.cuda(), to.raw(), from, to.bytes());
  }
}

Tensor CopyTo(Context& ctx, const Tensor& from) {
  std::vector<std::byte> bytes(from.bytes());
  CopyToHost(from, bytes.data());
  Tensor to = ctx.Empty(from.shape(), from.dtype());
  CopyFromHost(ctx, bytes.data(), to);
  return to;
}

}  // namespace longspan::test
