#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "parallel/comm/device_queue.h"

namespace longspan::parallel::internal {

// What MPI reads and writes for one operand: the operand itself in host memory, a pinned twin of it
// in GPU memory.
class MpiBuffer {
 public:
  // Host memory.
  explicit MpiBuffer(void* data) : host_(static_cast<std::byte*>(data)) {}
  // GPU memory; the queue has been told to wait for the compute stream.
  MpiBuffer(DeviceQueue& queue, void* device, int64_t bytes, int64_t chunk_bytes)
      : queue_(&queue),
        device_(static_cast<std::byte*>(device)),
        twin_(queue.Pinned(static_cast<size_t>(bytes))),
        host_(twin_.get()),
        bytes_(bytes),
        chunk_bytes_(chunk_bytes) {}

  std::byte* host() const { return host_; }
  const std::shared_ptr<std::byte>& twin() const { return twin_; }  // null for host memory

  // Starts to bring the device's bytes to the host, chunk by chunk.
  void Fetch();
  // Blocks until bytes [0, end) have arrived; the chunks after them keep moving.
  void Need(int64_t end);
  // What brings bytes [begin, begin + bytes) to the device once MPI has written them; null for host
  // memory.
  std::function<void()> Return(int64_t begin, int64_t bytes) const;

 private:
  DeviceQueue* queue_ = nullptr;
  std::byte* device_ = nullptr;
  std::shared_ptr<std::byte> twin_;
  std::byte* host_;
  int64_t bytes_ = 0, chunk_bytes_ = 1;
  std::vector<DeviceEventRef> arrived_;  // by chunk
  size_t seen_ = 0;                      // chunks known to have arrived
};

}  // namespace longspan::parallel::internal
