// Devices, streams, events and launches of the runtime API; memory is in memory_api.cpp.
#include "tests/emulated_cuda/runtime_api.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

#include "tests/emulated_cuda/block_runner.h"
#include "tests/emulated_cuda/memory.h"
#include "tests/emulated_cuda/stream.h"
#include "tests/emulated_cuda/tally.h"

namespace em = longspan::emulated;

namespace longspan::emulated {
namespace {

// Of an H100.
constexpr size_t kSharedPerBlock = 48 * 1024, kSharedOptin = 232448, kSharedPerProcessor = 233472;
// What a kernel may have of dynamic shared memory without asking: static shared memory counts too,
// and how much a kernel has of it is not known here.
constexpr size_t kSharedUnasked = kSharedPerBlock - 1024;
constexpr int kMaxThreads = 1024, kProcessors = 132, kMaxThreadsPerProcessor = 2048;
constexpr int kMaxBlocksPerProcessor = 32;
constexpr int kLeastPriority = 0, kGreatestPriority = -5;
constexpr int kCudaVersion = 13000;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

struct Kernels {
  std::mutex mutex;
  std::map<const void*, int> shared_limit;  // raised by cudaFuncSetAttribute
  std::vector<std::unique_ptr<BlockRunner>> idle;
};
Kernels& TheKernels() {
  static Kernels& kernels = *new Kernels;
  return kernels;
}

size_t SharedLimit(const void* kernel) {
  Kernels& kernels = TheKernels();
  const std::lock_guard lock(kernels.mutex);
  const auto it = kernels.shared_limit.find(kernel);
  return it == kernels.shared_limit.end() ? kSharedUnasked : static_cast<size_t>(it->second);
}

std::unique_ptr<BlockRunner> TakeRunner() {
  Kernels& kernels = TheKernels();
  const std::lock_guard lock(kernels.mutex);
  if (kernels.idle.empty()) return std::make_unique<BlockRunner>();
  auto runner = std::move(kernels.idle.back());
  kernels.idle.pop_back();
  return runner;
}
void ReturnRunner(std::unique_ptr<BlockRunner> runner) {
  Kernels& kernels = TheKernels();
  const std::lock_guard lock(kernels.mutex);
  kernels.idle.push_back(std::move(runner));
}

void RunKernel(const KernelRun& run, bool fails) {
  std::string why;
  if (fails) {
    why = "failed because a test asked for it";
  } else {
    auto runner = TakeRunner();
    why = runner->Run(run);
    ReturnRunner(std::move(runner));
  }
  if (!why.empty()) FailDevice(std::string("kernel ") + run.name + ": " + why);
}

bool ValidShape(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 2147483647u && grid.y <= 65535 &&
         grid.z <= 65535 && threads > 0 && threads <= kMaxThreads && block.z <= 64;
}

}  // namespace

int CurrentDevice() { return current_device; }

cudaError_t Report(cudaError_t error) {
  if (Failed()) return cudaErrorLaunchFailure;
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaStream_t Resolve(cudaStream_t stream) {
  return stream != nullptr ? stream : DefaultStream(current_device);
}

cudaError_t Enqueue(cudaStream_t stream, std::function<void()> work) {
  if (Failed()) return Report(cudaErrorLaunchFailure);
  Resolve(stream)->Add(std::move(work));
  return cudaSuccess;
}

}  // namespace longspan::emulated

using em::Report;
using em::Resolve;

namespace {
struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
#define LONGSPAN_ERROR(name, text) \
  { name, #name, text }
constexpr ErrorText kErrors[] = {
    LONGSPAN_ERROR(cudaSuccess, "no error"),
    LONGSPAN_ERROR(cudaErrorInvalidValue, "invalid argument"),
    LONGSPAN_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    LONGSPAN_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    LONGSPAN_ERROR(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    LONGSPAN_ERROR(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    LONGSPAN_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    LONGSPAN_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    LONGSPAN_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    LONGSPAN_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    LONGSPAN_ERROR(cudaErrorNotReady, "device not ready"),
    LONGSPAN_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    LONGSPAN_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    LONGSPAN_ERROR(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled"),
    LONGSPAN_ERROR(cudaErrorHostMemoryAlreadyRegistered,
                   "part or all of the requested memory range is already mapped"),
    LONGSPAN_ERROR(cudaErrorHostMemoryNotRegistered,
                   "pointer does not correspond to a registered memory region"),
    LONGSPAN_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    LONGSPAN_ERROR(cudaErrorNotSupported, "operation not supported"),
    LONGSPAN_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef LONGSPAN_ERROR
const ErrorText* Find(cudaError_t error) {
  const auto* it = std::find_if(std::begin(kErrors), std::end(kErrors),
                                [&](const ErrorText& e) { return e.error == error; });
  return it == std::end(kErrors) ? nullptr : it;
}
}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  const ErrorText* found = Find(error);
  return found != nullptr ? found->name : "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  const ErrorText* found = Find(error);
  return found != nullptr ? found->text : "unrecognized error code";
}
cudaError_t cudaPeekAtLastError() { return em::Failed() ? cudaErrorLaunchFailure : em::last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  em::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = em::DeviceCount();
  return Report(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
  *device = em::current_device;
  return Report(cudaSuccess);
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= em::DeviceCount()) return Report(cudaErrorInvalidDevice);
  em::current_device = device;
  return Report(cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= em::DeviceCount()) return Report(cudaErrorInvalidDevice);
  *p = {};
  std::snprintf(p->name, sizeof(p->name), "Emulated GPU");
  std::memcpy(p->uuid.bytes, "emulated", 8);
  p->uuid.bytes[15] = static_cast<char>(device);
  p->totalGlobalMem = em::UseOf(device).limit;
  p->sharedMemPerBlock = em::kSharedPerBlock;
  p->sharedMemPerBlockOptin = em::kSharedOptin;
  p->sharedMemPerMultiprocessor = em::kSharedPerProcessor;
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = em::kMaxThreads;
  p->maxThreadsPerMultiProcessor = em::kMaxThreadsPerProcessor;
  p->maxBlocksPerMultiProcessor = em::kMaxBlocksPerProcessor;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->minor = 0;
  p->multiProcessorCount = em::kProcessors;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->asyncEngineCount = 3;
  p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = 1;
  p->pciBusID = device + 1;
  return Report(cudaSuccess);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device); error != cudaSuccess) {
    return error;
  }
  const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock},
      {cudaDevAttrMaxSharedMemoryPerBlock, static_cast<int>(p.sharedMemPerBlock)},
      {cudaDevAttrWarpSize, p.warpSize},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
      {cudaDevAttrMemoryClockRate, 2619000},
      {cudaDevAttrGlobalMemoryBusWidth, p.memoryBusWidth},
      {cudaDevAttrL2CacheSize, p.l2CacheSize},
      {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor},
      {cudaDevAttrComputeCapabilityMajor, p.major},
      {cudaDevAttrComputeCapabilityMinor, p.minor},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, static_cast<int>(p.sharedMemPerMultiprocessor)},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(p.sharedMemPerBlockOptin)},
      {cudaDevAttrMemoryPoolsSupported, 1},
  };
  const auto it = values.find(attribute);
  if (it == values.end()) return Report(cudaErrorInvalidValue);
  *value = it->second;
  return Report(cudaSuccess);
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  if (device < 0 || device >= em::DeviceCount()) return Report(cudaErrorInvalidDevice);
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  return Report(cudaSuccess);
}
cudaError_t cudaDeviceSynchronize() {
  ++em::TheTally().host_waits;
  em::WaitForStreams(em::current_device);
  return Report(cudaSuccess);
}
cudaError_t cudaDeviceReset() {
  em::EndFailure();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = em::kLeastPriority;
  *greatest = em::kGreatestPriority;
  return Report(cudaSuccess);
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  const auto exists = [](int d) { return d >= 0 && d < em::DeviceCount(); };
  if (!exists(device) || !exists(peer)) return Report(cudaErrorInvalidDevice);
  *can = device != peer;
  return Report(cudaSuccess);
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  if (flags != 0) return Report(cudaErrorInvalidValue);
  const bool exists = peer >= 0 && peer < em::DeviceCount() && peer != em::current_device;
  return Report(exists ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = em::kCudaVersion;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  if (em::Failed() || flags > cudaStreamNonBlocking) return Report(cudaErrorInvalidValue);
  priority = std::clamp(priority, em::kGreatestPriority, em::kLeastPriority);
  *stream = new CUstream_st(em::current_device, flags, priority);
  return Report(cudaSuccess);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (stream == nullptr) return Report(cudaErrorInvalidResourceHandle);
  delete stream;
  return Report(cudaSuccess);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ++em::TheTally().host_waits;
  Resolve(stream)->AddMark()->Wait();
  return Report(cudaSuccess);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (em::Failed()) return cudaErrorLaunchFailure;
  return Resolve(stream)->Idle() ? cudaSuccess : Report(cudaErrorNotReady);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = Resolve(stream)->priority;
  return Report(cudaSuccess);
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = Resolve(stream)->flags;
  return Report(cudaSuccess);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  if (event == nullptr) return Report(cudaErrorInvalidResourceHandle);
  if (flags != 0) return Report(cudaErrorInvalidValue);
  if (em::Failed()) return cudaErrorLaunchFailure;
  if (auto last = event->Last(); last != nullptr) Resolve(stream)->AddWait(std::move(last));
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (function == nullptr) return Report(cudaErrorInvalidValue);
  return em::Enqueue(stream, [function, data] { function(data); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (em::Failed()) return cudaErrorLaunchFailure;
  if ((flags & ~(cudaEventBlockingSync | cudaEventDisableTiming)) != 0) {
    return Report(cudaErrorInvalidValue);
  }
  *event = new CUevent_st((flags & cudaEventDisableTiming) == 0);
  return Report(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event == nullptr) return Report(cudaErrorInvalidResourceHandle);
  delete event;
  return Report(cudaSuccess);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (event == nullptr) return Report(cudaErrorInvalidResourceHandle);
  if (em::Failed()) return cudaErrorLaunchFailure;
  auto mark = std::make_shared<em::Mark>();
  {
    const std::lock_guard lock(event->mutex);
    event->last = mark;
  }
  Resolve(stream)->AddMark(std::move(mark));
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (event == nullptr) return Report(cudaErrorInvalidResourceHandle);
  if (em::Failed()) return cudaErrorLaunchFailure;
  const auto last = event->Last();
  return last == nullptr || last->done.load() != 0 ? cudaSuccess : Report(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event == nullptr) return Report(cudaErrorInvalidResourceHandle);
  ++em::TheTally().host_waits;
  if (const auto last = event->Last(); last != nullptr) last->Wait();
  return Report(cudaSuccess);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (start == nullptr || end == nullptr || !start->timed || !end->timed) {
    return Report(cudaErrorInvalidResourceHandle);
  }
  const auto from = start->Last(), to = end->Last();
  if (from == nullptr || to == nullptr) return Report(cudaErrorInvalidResourceHandle);
  if (from->done.load() == 0 || to->done.load() == 0) return Report(cudaErrorNotReady);
  *milliseconds = static_cast<float>((to->seconds - from->seconds) * 1e3);
  return Report(cudaSuccess);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (kernel == nullptr) return Report(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    return Report(value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue);
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > em::kSharedOptin) {
    return Report(cudaErrorInvalidValue);
  }
  em::Kernels& kernels = em::TheKernels();
  const std::lock_guard lock(kernels.mutex);
  kernels.shared_limit[kernel] = value;
  return Report(cudaSuccess);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (kernel == nullptr) return Report(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->maxThreadsPerBlock = em::kMaxThreads;
  attributes->numRegs = 64;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(em::SharedLimit(kernel));
  return Report(cudaSuccess);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int block_threads, size_t shared_bytes) {
  if (kernel == nullptr) return Report(cudaErrorInvalidDeviceFunction);
  if (block_threads <= 0) return Report(cudaErrorInvalidValue);
  const int warps = (block_threads + 31) / 32;
  const bool fits = block_threads <= em::kMaxThreads && shared_bytes <= em::SharedLimit(kernel);
  const int by_shared = static_cast<int>(em::kSharedPerProcessor / (shared_bytes + 1024));
  *blocks = fits ? std::min({em::kMaxBlocksPerProcessor, by_shared,
                             em::kMaxThreadsPerProcessor / (32 * warps)})
                 : 0;
  return Report(cudaSuccess);
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  if (kernel == nullptr) return Report(cudaErrorInvalidDeviceFunction);
  if (em::Failed()) return cudaErrorLaunchFailure;
  if (!em::ValidShape(grid, block)) return Report(cudaErrorInvalidConfiguration);
  if (shared_bytes > em::SharedLimit(kernel)) return Report(cudaErrorInvalidValue);
  if (em::TakeFault(em::Fault::kLaunch)) return Report(cudaErrorLaunchOutOfResources);
  const auto& bound = *static_cast<const EmulatedKernel*>(arguments[0]);
  em::CountLaunch(bound.name);
  stream = Resolve(stream);
  const uint64_t seed = em::Seed() + 0x9e3779b97f4a7c15u * ++stream->launches;
  const bool fails = em::TakeFault(em::Fault::kKernel);
  stream->Add([bound, grid, block, shared_bytes, seed, fails] {
    em::RunKernel({bound.name, grid, block, shared_bytes, &bound.run, seed}, fails);
  });
  return cudaSuccess;  // whatever becomes of the kernel
}
