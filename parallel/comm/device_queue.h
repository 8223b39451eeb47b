#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "ops/core/device.h"
#include "ops/core/dtype.h"
#include "parallel/comm/communicator.h"

// A communicator's stream on its rank's GPU, without CUDA's own headers.
namespace longspan::parallel::internal {

// A point in the order of a stream. Kept alive until nobody waits for it any more.
struct DeviceEvent;
using DeviceEventRef = std::shared_ptr<DeviceEvent>;

// Sums of DeviceQueue::Reduce have at most this many operands.
inline constexpr int kMaxReduceRanks = 64;

// A stream of the highest priority beside the compute stream of a Runtime, and memory for what
// passes through it. Where the streams must follow each other is said with events.
//
// Threads   all calls may come from any thread; AfterCompute and ComputeWaitsFor from the thread
//           that uses the Runtime
// Errors    CudaError
class DeviceQueue {
 public:
  virtual ~DeviceQueue() = default;
  virtual Device device() const = 0;
  // Another compute stream on the same GPU; InvalidArgument for another GPU.
  virtual void SetCompute(std::shared_ptr<cuda::Runtime> runtime) = 0;

  virtual DeviceEventRef AfterCompute() = 0;  // all that the compute stream has been given so far
  virtual void ComputeWaitsFor(const DeviceEventRef& event) = 0;  // with all that it gets later
  virtual DeviceEventRef Record() = 0;                            // all this queue has been given
  virtual void WaitFor(const DeviceEventRef& event) = 0;          // with all that it gets later
  virtual bool Done(const DeviceEventRef& event) = 0;
  virtual void Synchronize(const DeviceEventRef& event) = 0;  // blocks the host

  // Between device memory and device or pinned host memory. The ranges may be equal, and may not
  // overlap otherwise (InvalidArgument).
  virtual void Copy(void* to, const void* from, size_t bytes) = 0;
  // targets[j][i] = sources[0][i] op sources[1][i] op ... for i < n and all j, in this order; a
  // target may be one of the sources. f32, f64, i32, i64; at most kMaxReduceRanks of each.
  virtual void Reduce(std::span<const void* const> sources, std::span<void* const> targets,
                      int64_t n, DType dtype, ReduceOp op) = 0;

  // Pinned host memory, and device memory for this queue's work alone, kept for reuse when
  // released. Device memory may be released as soon as the queue has been given all work on it;
  // pinned memory when that work is done.
  virtual std::shared_ptr<std::byte> Pinned(size_t bytes) = 0;
  virtual std::shared_ptr<std::byte> Scratch(size_t bytes) = 0;
  // Holds on to `memory` until `event` is done.
  virtual void Keep(const DeviceEventRef& event, std::shared_ptr<void> memory) = 0;
};

// Errors: Unsupported in a binary without CUDA.
std::shared_ptr<DeviceQueue> MakeDeviceQueue(std::shared_ptr<cuda::Runtime> runtime);

// The GPU of a runtime.
Device DeviceOf(const cuda::Runtime& runtime);

// What UseDevice does in all communicators that have a queue.
inline void UseQueue(std::shared_ptr<DeviceQueue>& queue, std::shared_ptr<cuda::Runtime> runtime) {
  if (runtime == nullptr) return;
  if (queue == nullptr) {
    queue = MakeDeviceQueue(std::move(runtime));
  } else {
    queue->SetCompute(std::move(runtime));
  }
}

}  // namespace longspan::parallel::internal
