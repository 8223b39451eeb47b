// Binaries without CUDA: no device, and nothing that could ask for one gets past MakeRuntime.
#include "ops/core/cuda/backend.h"
#include "ops/core/error.h"

namespace longspan::cuda {
namespace {

[[noreturn]] void Refuse() {
  throw Unsupported("device CUDA is not built into this binary; use device: CPU");
}

}  // namespace

int DeviceCount(std::string* why) {
  if (why != nullptr) *why = "this binary was built without CUDA";
  return 0;
}
std::shared_ptr<Runtime> MakeRuntime(int, bool) { Refuse(); }
std::unique_ptr<MemorySource> DeviceMemory(std::shared_ptr<Runtime>) { Refuse(); }
std::unique_ptr<MemorySource> MappedHostMemory(std::shared_ptr<Runtime>) { Refuse(); }
void Set(Runtime&, void*, int, size_t) { Refuse(); }
void Upload(Runtime&, void*, const void*, size_t) { Refuse(); }
void ReserveUploads(Runtime&, size_t) { Refuse(); }
void Download(Runtime&, void*, const void*, size_t) { Refuse(); }
void CopyOnDevice(Runtime&, void*, const void*, size_t) { Refuse(); }
void Synchronize(Runtime&) { Refuse(); }
std::unique_ptr<Mark> MakeMark(Runtime&) { Refuse(); }
std::unique_ptr<Readback> MakeReadback(Runtime&, size_t) { Refuse(); }
void PushRange(const char*) { Refuse(); }
void PopRange() { Refuse(); }
DeviceFacts FactsOf(int) { Refuse(); }
void DownloadAfterAll(int, void*, const void*, size_t) { Refuse(); }

}  // namespace longspan::cuda
