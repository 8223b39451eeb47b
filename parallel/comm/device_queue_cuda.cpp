#include "parallel/comm/device_queue_cuda.h"

#include <cstring>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "ops/core/allocator.h"
#include "ops/core/check.h"
#include "ops/core/context.h"

namespace longspan::parallel::internal {

struct DeviceEvent {
  cuda::Event event;
};

namespace {

// Events that nobody refers to any more, for the next marks.
class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  DeviceEventRef Take() {
    std::unique_ptr<DeviceEvent> event;
    {
      std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        event = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (event == nullptr) event = std::make_unique<DeviceEvent>();
    // A wait that a stream was given earlier keeps meaning what was recorded then.
    return DeviceEventRef(event.release(), [pool = shared_from_this()](DeviceEvent* e) {
      std::lock_guard lock(pool->mutex_);
      pool->free_.emplace_back(e);
    });
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<DeviceEvent>> free_;
};

class PinnedMemory : public MemorySource {
 public:
  explicit PinnedMemory(int device) : device_(device) {}
  void* Get(size_t bytes) override {
    LONGSPAN_CUDA(cudaSetDevice(device_));
    void* block = nullptr;
    const cudaError_t status = cudaHostAlloc(&block, bytes, cudaHostAllocDefault);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    LONGSPAN_CUDA(status);
    return block;
  }
  void Return(void* block) noexcept override { cudaFreeHost(block); }
  void Fill(void* block, int byte, size_t bytes) override { std::memset(block, byte, bytes); }
  void ToHost(void* host, const void* block, size_t bytes) override {
    std::memcpy(host, block, bytes);
  }
  void FromHost(void* block, const void* host, size_t bytes) override {
    std::memcpy(block, host, bytes);
  }
  const char* name() const override { return "pinned host"; }

 private:
  const int device_;
};

// The stream and its device memory; lives as long as the last block.
class StreamMemory {
 public:
  explicit StreamMemory(int device) : device(device) {
    LONGSPAN_CUDA(cudaSetDevice(device));
    int lowest = 0, highest = 0;
    LONGSPAN_CUDA(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    LONGSPAN_CUDA(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest));
  }
  ~StreamMemory() {
    if (cudaSetDevice(device) != cudaSuccess) return;
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;

  const int device;
  cudaStream_t stream = nullptr;
};

class ScratchMemory : public MemorySource {
 public:
  explicit ScratchMemory(std::shared_ptr<StreamMemory> owner) : owner_(std::move(owner)) {}
  void* Get(size_t bytes) override {
    LONGSPAN_CUDA(cudaSetDevice(owner_->device));
    void* block = nullptr;
    const cudaError_t status = cudaMallocAsync(&block, bytes, owner_->stream);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    LONGSPAN_CUDA(status);
    return block;
  }
  void Return(void* block) noexcept override {
    if (cudaSetDevice(owner_->device) == cudaSuccess) cudaFreeAsync(block, owner_->stream);
  }
  void Fill(void* block, int byte, size_t bytes) override {
    LONGSPAN_CUDA(cudaMemsetAsync(block, byte, bytes, owner_->stream));
  }
  void ToHost(void* host, const void* block, size_t bytes) override {
    LONGSPAN_CUDA(cudaMemcpyAsync(host, block, bytes, cudaMemcpyDeviceToHost, owner_->stream));
    LONGSPAN_CUDA(cudaStreamSynchronize(owner_->stream));
  }
  void FromHost(void* block, const void* host, size_t bytes) override {
    LONGSPAN_CUDA(cudaMemcpyAsync(block, host, bytes, cudaMemcpyHostToDevice, owner_->stream));
    LONGSPAN_CUDA(cudaStreamSynchronize(owner_->stream));
  }
  const char* name() const override { return "GPU"; }

 private:
  const std::shared_ptr<StreamMemory> owner_;
};

std::shared_ptr<std::byte> BlockOf(const std::shared_ptr<Allocator>& allocator, size_t bytes) {
  auto storage = std::make_shared<Storage>(allocator, bytes);
  std::byte* data = storage->data();
  return {std::move(storage), data};
}

class CudaQueue : public DeviceQueue {
 public:
  explicit CudaQueue(std::shared_ptr<cuda::Runtime> runtime)
      : runtime_(std::move(runtime)),
        stream_(std::make_shared<StreamMemory>(runtime_->device())),
        events_(std::make_shared<EventPool>()),
        pinned_(std::make_shared<Allocator>(ContextOptions::kPoisonDefault,
                                            std::make_unique<PinnedMemory>(runtime_->device()))),
        scratch_(std::make_shared<Allocator>(ContextOptions::kPoisonDefault,
                                             std::make_unique<ScratchMemory>(stream_))) {}
  ~CudaQueue() override {
    if (cudaSetDevice(runtime_->device()) == cudaSuccess) cudaStreamSynchronize(stream_->stream);
  }

  cudaStream_t stream() const { return stream_->stream; }
  Device device() const override { return {DeviceKind::kCuda, runtime_->device()}; }

  void SetCompute(std::shared_ptr<cuda::Runtime> runtime) override {
    LONGSPAN_CHECK(runtime->device() == runtime_->device())
        << "UseDevice: cuda:" << runtime->device() << " after cuda:" << runtime_->device();
    std::lock_guard lock(mutex_);
    runtime_ = std::move(runtime);
  }

  DeviceEventRef AfterCompute() override {
    runtime_->MakeCurrent();
    DeviceEventRef event = events_->Take();
    event->event.Record(runtime_->stream());
    return event;
  }
  void ComputeWaitsFor(const DeviceEventRef& event) override {
    runtime_->MakeCurrent();
    event->event.Wait(runtime_->stream());
  }
  DeviceEventRef Record() override {
    MakeCurrent();
    DeviceEventRef event = events_->Take();
    event->event.Record(stream());
    return event;
  }
  void WaitFor(const DeviceEventRef& event) override {
    MakeCurrent();
    event->event.Wait(stream());
  }
  bool Done(const DeviceEventRef& event) override {
    MakeCurrent();
    return event->event.Done();
  }
  void Synchronize(const DeviceEventRef& event) override {
    MakeCurrent();
    event->event.Synchronize();
  }

  void Copy(void* to, const void* from, size_t bytes) override {
    if (to == from || bytes == 0) return;
    const auto* source = static_cast<const std::byte*>(from);
    const auto* target = static_cast<const std::byte*>(to);
    LONGSPAN_CHECK(source + bytes <= target || target + bytes <= source)
        << "a copy of " << bytes << " bytes in GPU memory onto a range that overlaps it";
    MakeCurrent();
    LONGSPAN_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()));
  }
  void Reduce(std::span<const void* const> sources, std::span<void* const> targets, int64_t n,
              DType dtype, ReduceOp op) override {
    ReduceRanks(*runtime_, stream(), sources, targets, n, dtype, op);
  }

  std::shared_ptr<std::byte> Pinned(size_t bytes) override {
    DropDone();
    return BlockOf(pinned_, bytes);
  }
  std::shared_ptr<std::byte> Scratch(size_t bytes) override { return BlockOf(scratch_, bytes); }
  void Keep(const DeviceEventRef& event, std::shared_ptr<void> memory) override {
    std::lock_guard lock(mutex_);
    kept_.emplace_back(event, std::move(memory));
  }

 private:
  void MakeCurrent() const { LONGSPAN_CUDA(cudaSetDevice(stream_->device)); }
  void DropDone() {
    MakeCurrent();
    std::lock_guard lock(mutex_);
    while (!kept_.empty() && kept_.front().first->event.Done()) kept_.pop_front();
  }

  std::shared_ptr<cuda::Runtime> runtime_;
  const std::shared_ptr<StreamMemory> stream_;
  const std::shared_ptr<EventPool> events_;
  const std::shared_ptr<Allocator> pinned_, scratch_;
  std::mutex mutex_;
  std::deque<std::pair<DeviceEventRef, std::shared_ptr<void>>> kept_;
};

}  // namespace

std::shared_ptr<DeviceQueue> MakeDeviceQueue(std::shared_ptr<cuda::Runtime> runtime) {
  return std::make_shared<CudaQueue>(std::move(runtime));
}
Device DeviceOf(const cuda::Runtime& runtime) { return {DeviceKind::kCuda, runtime.device()}; }
cudaStream_t StreamOf(DeviceQueue& queue) { return static_cast<CudaQueue&>(queue).stream(); }

}  // namespace longspan::parallel::internal
