// Binaries without CUDA: there is no Runtime that could get here.
#include "parallel/comm/device_queue.h"

namespace longspan::parallel::internal {
namespace {

[[noreturn]] void Refuse() {
  throw Unsupported("device CUDA is not built into this binary; use device: CPU");
}

}  // namespace

std::shared_ptr<DeviceQueue> MakeDeviceQueue(std::shared_ptr<cuda::Runtime>) { Refuse(); }
Device DeviceOf(const cuda::Runtime&) { Refuse(); }

}  // namespace longspan::parallel::internal
