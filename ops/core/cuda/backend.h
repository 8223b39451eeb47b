#pragma once
#include <cstddef>
#include <memory>
#include <string>

#include "ops/core/allocator.h"

// What the rest of the code needs of a GPU without CUDA's own headers. The cuda preset builds it
// from runtime.cpp; the others from backend_none.cpp, which has no device and refuses to make a
// Runtime.
namespace longspan::cuda {

class Runtime;  // runtime.h

// Number of GPUs that this process can use; 0 also without a driver. `why` says why there is none.
int DeviceCount(std::string* why = nullptr);

// Errors: Unsupported in a binary without CUDA; CudaError when there is no such device.
std::shared_ptr<Runtime> MakeRuntime(int device, bool sync_checks);

// Source of stream-ordered memory; keeps the runtime alive.
std::unique_ptr<MemorySource> DeviceMemory(std::shared_ptr<Runtime> runtime);

// Source of pinned host memory that kernels of this GPU read and write in place, over the bus; keeps
// the runtime alive.
std::unique_ptr<MemorySource> MappedHostMemory(std::shared_ptr<Runtime> runtime);

// In the order of the runtime's stream; see Runtime.
void Set(Runtime& runtime, void* to, int byte, size_t bytes);
void Upload(Runtime& runtime, void* to, const void* from, size_t bytes);
void ReserveUploads(Runtime& runtime, size_t bytes);
void Download(Runtime& runtime, void* to, const void* from, size_t bytes);
void CopyOnDevice(Runtime& runtime, void* to, const void* from, size_t bytes);
void Synchronize(Runtime& runtime);

// A point in the order of a runtime's stream, with the device's clock.
class Mark {
 public:
  virtual ~Mark() = default;
  virtual void Record() = 0;      // here; may be called again and again
  virtual bool Done() const = 0;  // has the device got there?
  virtual void Wait() const = 0;  // blocks until then
  // Milliseconds on the device's clock since `start`; both recorded and done.
  virtual double MillisecondsSince(const Mark& start) const = 0;
};
std::unique_ptr<Mark> MakeMark(Runtime& runtime);

// Brings small results to the host without stopping it: pinned memory and the mark that says when
// it holds what was asked for. One copy is under way at a time. Neither may outlive the runtime.
class Readback {
 public:
  virtual ~Readback() = default;
  // The bytes at device address `from`, as they are at this point of the stream's order.
  virtual void Start(const void* from, size_t bytes) = 0;
  virtual bool Done() const = 0;
  virtual const void* Wait() = 0;  // blocks until the copy is done; good until the next Start
};
std::unique_ptr<Readback> MakeReadback(Runtime& runtime, size_t capacity_bytes);

// Nested ranges of the calling thread for profilers (NVTX), which cost next to nothing without one.
void PushRange(const char* name);
void PopRange();

// What is known of GPU `index`, for choosing peaks and for telling GPUs apart.
struct DeviceFacts {
  std::string name;          // "NVIDIA H100 80GB HBM3"
  std::string id;            // the same for every process of a node that uses this GPU
  int major = 0, minor = 0;  // compute capability
  int64_t l2_bytes = 0, memory_bytes = 0;
};
DeviceFacts FactsOf(int index);

// Waits for all streams of GPU `device`, then copies: for callers without a Runtime, such as tests.
void DownloadAfterAll(int device, void* to, const void* from, size_t bytes);

}  // namespace longspan::cuda
