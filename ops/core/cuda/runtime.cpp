#include "ops/core/cuda/runtime.h"

#include <algorithm>
#include <cstring>
#include <deque>

#include "ops/core/check.h"
#include "ops/core/error.h"

namespace longspan::cuda {
namespace {

constexpr size_t kLeastStagingBytes = size_t{16} << 20;
constexpr size_t kPartBytes = size_t{1} << 20;  // at most, of one copy
constexpr size_t kStagedAlignment = 256;
constexpr int kOldestMajor = 8;  // sm_80: bf16 mma, cp.async

// Memory of the device's default pool, which keeps what is returned until the process ends. Order
// on the stream makes a freed block safe to reuse before the kernels that read it have run.
class StreamMemory : public MemorySource {
 public:
  explicit StreamMemory(std::shared_ptr<Runtime> runtime) : runtime_(std::move(runtime)) {
    LONGSPAN_CUDA(cudaDeviceGetDefaultMemPool(&pool_, runtime_->device()));
    uint64_t keep = UINT64_MAX;
    LONGSPAN_CUDA(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep));
  }
  void* Get(size_t bytes) override {
    runtime_->MakeCurrent();
    void* block = Try(bytes);
    if (block == nullptr) {
      // Blocks that were returned count until the stream has got there, and the pool holds on to
      // memory in pieces of other sizes.
      runtime_->Synchronize();
      LONGSPAN_CUDA(cudaMemPoolTrimTo(pool_, 0));
      block = Try(bytes);
    }
    return block;
  }
  // A failure here means that the device is already lost, which the next launch reports.
  void Return(void* block) noexcept override {
    if (cudaSetDevice(runtime_->device()) == cudaSuccess) cudaFreeAsync(block, runtime_->stream());
  }
  void Fill(void* block, int byte, size_t bytes) override { runtime_->Set(block, byte, bytes); }
  void ToHost(void* host, const void* block, size_t bytes) override {
    runtime_->Download(host, block, bytes);
  }
  void FromHost(void* block, const void* host, size_t bytes) override {
    runtime_->Upload(block, host, bytes);
  }
  const char* name() const override { return "GPU"; }

 private:
  void* Try(size_t bytes) {
    void* block = nullptr;
    const cudaError_t status = cudaMallocAsync(&block, bytes, runtime_->stream());
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // not sticky: the next call is not to report it
      return nullptr;
    }
    LONGSPAN_CUDA(status);
    return block;
  }
  const std::shared_ptr<Runtime> runtime_;  // tensors may outlive the Context that made them
  cudaMemPool_t pool_ = nullptr;
};

// Kernels use the host's address (unified addressing, which all 64-bit platforms have).
class MappedMemory : public MemorySource {
 public:
  explicit MappedMemory(std::shared_ptr<Runtime> runtime) : runtime_(std::move(runtime)) {}
  void* Get(size_t bytes) override {
    runtime_->MakeCurrent();
    void* block = nullptr;
    const cudaError_t status =
        cudaHostAlloc(&block, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    LONGSPAN_CUDA(status);
    return block;
  }
  // Kernels may still use it.
  void Return(void* block) noexcept override {
    cudaStreamSynchronize(runtime_->stream());
    cudaFreeHost(block);
  }
  void Fill(void* block, int byte, size_t bytes) override {
    runtime_->Synchronize();
    std::memset(block, byte, bytes);
  }
  void ToHost(void* host, const void* block, size_t bytes) override {
    runtime_->Synchronize();
    std::memcpy(host, block, bytes);
  }
  void FromHost(void* block, const void* host, size_t bytes) override {
    runtime_->Synchronize();
    std::memcpy(block, host, bytes);
  }
  const char* name() const override { return "pinned host"; }

 private:
  const std::shared_ptr<Runtime> runtime_;
};

class StreamMark : public Mark {
 public:
  explicit StreamMark(Runtime& runtime) : runtime_(runtime), event_(Current(runtime)) {}
  void Record() override {
    runtime_.MakeCurrent();
    event_.Record(runtime_.stream());
  }
  bool Done() const override { return event_.Done(); }
  void Wait() const override { event_.Synchronize(); }
  double MillisecondsSince(const Mark& start) const override {
    return event_.MillisecondsSince(static_cast<const StreamMark&>(start).event_);
  }

 private:
  static bool Current(const Runtime& runtime) {
    runtime.MakeCurrent();
    return true;  // with timing
  }
  Runtime& runtime_;
  Event event_;
};

class PinnedReadback : public Readback {
 public:
  PinnedReadback(Runtime& runtime, size_t capacity)
      : runtime_(runtime), capacity_(capacity), mark_(runtime) {
    LONGSPAN_CUDA(cudaHostAlloc(&data_, capacity_, cudaHostAllocDefault));
  }
  ~PinnedReadback() override {
    // The copy that may be under way writes here.
    cudaStreamSynchronize(runtime_.stream());
    cudaFreeHost(data_);
  }
  void Start(const void* from, size_t bytes) override {
    LONGSPAN_CHECK(bytes <= capacity_) << "Readback: " << bytes << " bytes into " << capacity_;
    runtime_.MakeCurrent();
    LONGSPAN_CUDA(cudaMemcpyAsync(data_, from, bytes, cudaMemcpyDeviceToHost, runtime_.stream()));
    mark_.Record();
  }
  bool Done() const override { return mark_.Done(); }
  const void* Wait() override {
    mark_.Wait();
    return data_;
  }

 private:
  Runtime& runtime_;
  const size_t capacity_;
  StreamMark mark_;
  void* data_ = nullptr;
};

}  // namespace

std::unique_ptr<Mark> MakeMark(Runtime& runtime) { return std::make_unique<StreamMark>(runtime); }
std::unique_ptr<Readback> MakeReadback(Runtime& runtime, size_t capacity_bytes) {
  return std::make_unique<PinnedReadback>(runtime, capacity_bytes);
}
std::shared_ptr<Runtime> MakeRuntime(int device, bool sync_checks) {
  return std::make_shared<Runtime>(device, sync_checks);
}
std::unique_ptr<MemorySource> DeviceMemory(std::shared_ptr<Runtime> runtime) {
  return std::make_unique<StreamMemory>(std::move(runtime));
}
std::unique_ptr<MemorySource> MappedHostMemory(std::shared_ptr<Runtime> runtime) {
  return std::make_unique<MappedMemory>(std::move(runtime));
}
void Set(Runtime& runtime, void* to, int byte, size_t bytes) { runtime.Set(to, byte, bytes); }
void Upload(Runtime& runtime, void* to, const void* from, size_t bytes) {
  runtime.Upload(to, from, bytes);
}
void ReserveUploads(Runtime& runtime, size_t bytes) { runtime.ReserveUploads(bytes); }
void Download(Runtime& runtime, void* to, const void* from, size_t bytes) {
  runtime.Download(to, from, bytes);
}
void CopyOnDevice(Runtime& runtime, void* to, const void* from, size_t bytes) {
  runtime.Copy(to, from, bytes);
}
void Synchronize(Runtime& runtime) { runtime.Synchronize(); }
DeviceFacts FactsOf(int index) {
  cudaDeviceProp p{};
  LONGSPAN_CUDA(cudaGetDeviceProperties(&p, index));
  DeviceFacts facts;
  facts.name = p.name;
  facts.id = Str(p.pciDomainID, ":", p.pciBusID, ":", p.pciDeviceID);
  // Slices of one GPU (MIG) share its bus id and have identifiers of their own.
  for (const char byte : p.uuid.bytes) facts.id += Str(":", static_cast<int>(byte) & 0xff);
  facts.major = p.major;
  facts.minor = p.minor;
  facts.l2_bytes = p.l2CacheSize;
  facts.memory_bytes = static_cast<int64_t>(p.totalGlobalMem);
  return facts;
}
void DownloadAfterAll(int device, void* to, const void* from, size_t bytes) {
  LONGSPAN_CUDA(cudaSetDevice(device));
  LONGSPAN_CUDA(cudaDeviceSynchronize());
  LONGSPAN_CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

void Check(cudaError_t status, const char* expression, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw CudaError(Str(cudaGetErrorString(status), " (", cudaGetErrorName(status), ") from ",
                      expression, " at ", file, ":", line));
}

int DeviceCount(std::string* why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  if (why != nullptr) {
    // A machine without a driver is said to have one that is too old.
    int driver = 0;
    const bool missing = cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0;
    *why = missing                 ? "no NVIDIA driver was found"
           : status == cudaSuccess ? "the driver reports no device"
                                   : cudaGetErrorString(status);
  }
  cudaGetLastError();
  return 0;
}

Event::Event(bool timing) {
  LONGSPAN_CUDA(
      cudaEventCreateWithFlags(&event_, timing ? cudaEventDefault : cudaEventDisableTiming));
}
Event::~Event() { cudaEventDestroy(event_); }
void Event::Record(cudaStream_t stream) { LONGSPAN_CUDA(cudaEventRecord(event_, stream)); }
void Event::Wait(cudaStream_t stream) const {
  LONGSPAN_CUDA(cudaStreamWaitEvent(stream, event_, 0));
}
bool Event::Done() const {
  const cudaError_t status = cudaEventQuery(event_);
  if (status == cudaErrorNotReady) {
    cudaGetLastError();  // an answer here, but the next one who asks would take it for an error
    return false;
  }
  LONGSPAN_CUDA(status);
  return true;
}
void Event::Synchronize() const { LONGSPAN_CUDA(cudaEventSynchronize(event_)); }
float Event::MillisecondsSince(const Event& start) const {
  float milliseconds = 0;
  LONGSPAN_CUDA(cudaEventElapsedTime(&milliseconds, start.event_, event_));
  return milliseconds;
}

Runtime::Runtime(int device, bool sync_checks) : device_(device), sync_checks_(sync_checks) {
  std::string why;
  const int count = DeviceCount(&why);
  if (count == 0) {
    throw CudaError(Str("no GPU can be used: ", why, "; use device: CPU, or look at nvidia-smi"));
  }
  if (device < 0 || device >= count) {
    throw CudaError(Str("GPU ", device, " does not exist: this process sees ", count,
                        "; start at most that many ranks on this node"));
  }
  MakeCurrent();
  LONGSPAN_CUDA(cudaGetDeviceProperties(&properties_, device_));
  if (properties_.major < kOldestMajor) {
    throw CudaError(Str("GPU ", device, " (", properties_.name, ") has compute capability ",
                        properties_.major, ".", properties_.minor, "; 8.0 or newer is needed"));
  }
  LONGSPAN_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  ReserveUploads(0);
}

Runtime::~Runtime() {
  if (cudaSetDevice(device_) != cudaSuccess) return;
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  libraries_.clear();
  staged_.clear();
  free_events_.clear();
  if (staging_ != nullptr) cudaFreeHost(staging_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

void Runtime::MakeCurrent() const { LONGSPAN_CUDA(cudaSetDevice(device_)); }

void Runtime::Synchronize() const {
  MakeCurrent();
  LONGSPAN_CUDA(cudaStreamSynchronize(stream_));
}

void Runtime::ReserveUploads(size_t bytes) {
  // What rounding parts up and the end of the memory waste is less than a part.
  const size_t wanted = std::max(kLeastStagingBytes, 2 * (bytes + kPartBytes));
  if (wanted <= staging_bytes_) return;
  MakeCurrent();
  std::byte* larger = nullptr;
  LONGSPAN_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&larger), wanted, cudaHostAllocDefault));
  while (!staged_.empty()) {
    staged_.front().copied->Synchronize();
    RetireOldest();
  }
  if (staging_ != nullptr) LONGSPAN_CUDA(cudaFreeHost(staging_));
  staging_ = larger;
  staging_bytes_ = wanted;
  next_staged_ = 0;
}

void Runtime::RetireOldest() {
  free_events_.push_back(std::move(staged_.front().copied));
  staged_.pop_front();
}

std::byte* Runtime::Stage(size_t bytes) {
  bytes = (bytes + kStagedAlignment - 1) / kStagedAlignment * kStagedAlignment;
  while (!staged_.empty() && staged_.front().copied->Done()) RetireOldest();
  const auto wait_while = [&](auto in_the_way) {
    while (!staged_.empty() && in_the_way(staged_.front())) {
      staged_.front().copied->Synchronize();
      RetireOldest();
    }
  };
  if (next_staged_ + bytes > staging_bytes_) {  // the oldest parts are at the end
    wait_while([this](const Part& part) { return part.begin >= next_staged_; });
    next_staged_ = 0;
  }
  const size_t begin = next_staged_, end = begin + bytes;
  wait_while([&](const Part& part) { return part.begin < end && begin < part.end; });
  if (free_events_.empty()) free_events_.push_back(std::make_unique<Event>());
  staged_.push_back({begin, end, std::move(free_events_.back())});
  free_events_.pop_back();
  next_staged_ = end;
  return staging_ + begin;
}

void Runtime::Upload(void* to, const void* from, size_t bytes) {
  MakeCurrent();
  auto* target = static_cast<std::byte*>(to);
  const auto* source = static_cast<const std::byte*>(from);
  while (bytes > 0) {
    const size_t part = std::min(bytes, kPartBytes);
    std::byte* staged = Stage(part);
    std::memcpy(staged, source, part);
    LONGSPAN_CUDA(cudaMemcpyAsync(target, staged, part, cudaMemcpyHostToDevice, stream_));
    staged_.back().copied->Record(stream_);
    target += part, source += part, bytes -= part;
  }
}

// Through the staging memory: while one part travels, the one before it is copied on. A transfer
// into pageable memory would take a multiple of the time.
void Runtime::Download(void* to, const void* from, size_t bytes) {
  MakeCurrent();
  auto* target = static_cast<std::byte*>(to);
  const auto* source = static_cast<const std::byte*>(from);
  // Half of the least staging memory at a time, so that no part is handed out again before it is
  // read.
  struct Arriving {
    std::byte *staged, *target;
    size_t bytes;
    Event copied;
  };
  std::deque<std::unique_ptr<Arriving>> under_way;
  const auto take_oldest = [&] {
    const Arriving& oldest = *under_way.front();
    oldest.copied.Synchronize();
    std::memcpy(oldest.target, oldest.staged, oldest.bytes);
    under_way.pop_front();
  };
  while (bytes > 0) {
    if (under_way.size() == kLeastStagingBytes / kPartBytes / 2) take_oldest();
    const size_t part = std::min(bytes, kPartBytes);
    under_way.push_back(std::make_unique<Arriving>());
    Arriving& arriving = *under_way.back();
    arriving.staged = Stage(part);
    arriving.target = target;
    arriving.bytes = part;
    LONGSPAN_CUDA(cudaMemcpyAsync(arriving.staged, source, part, cudaMemcpyDeviceToHost, stream_));
    staged_.back().copied->Record(stream_);
    arriving.copied.Record(stream_);
    target += part, source += part, bytes -= part;
  }
  while (!under_way.empty()) take_oldest();
}

void Runtime::Copy(void* to, const void* from, size_t bytes) const {
  MakeCurrent();
  LONGSPAN_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_));
}

void Runtime::Set(void* to, int byte, size_t bytes) const {
  MakeCurrent();
  LONGSPAN_CUDA(cudaMemsetAsync(to, byte, bytes, stream_));
}

}  // namespace longspan::cuda
