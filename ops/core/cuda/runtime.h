#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ops/core/cuda/backend.h"

namespace longspan::cuda {

// Throws CudaError naming the call, its place and the driver's reason unless `status` is success.
void Check(cudaError_t status, const char* expression, const char* file, int line);
#define LONGSPAN_CUDA(expression) \
  ::longspan::cuda::Check((expression), #expression, __FILE__, __LINE__)

// An event without host timing unless asked for.
class Event {
 public:
  explicit Event(bool timing = false);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void Record(cudaStream_t stream);
  void Wait(cudaStream_t stream) const;  // later work of `stream` waits for what was recorded
  bool Done() const;
  void Synchronize() const;
  // Milliseconds from `start`; both timed and done.
  float MillisecondsSince(const Event& start) const;

 private:
  cudaEvent_t event_ = nullptr;
};

// The GPU of one rank: its compute stream, and pinned memory through which small host data reaches
// the device without stopping the host. A Runtime is used by one thread at a time, which need not
// be the one that made it: every call makes its device current first.
class Runtime {
 public:
  // Errors: CudaError when `device` is not among DeviceCount() or is older than sm_80.
  Runtime(int device, bool sync_checks);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  int device() const { return device_; }
  const cudaDeviceProp& properties() const { return properties_; }
  cudaStream_t stream() const { return stream_; }
  // Debugging: every launch waits for its kernel, so that an error is reported where it happened.
  bool sync_checks() const { return sync_checks_; }

  void MakeCurrent() const;
  void Synchronize() const;

  // Device memory at `to` holds the bytes at `from` for all later work on the stream. The host may
  // reuse `from` as soon as this returns. Blocks only while the staging memory is full.
  void Upload(void* to, const void* from, size_t bytes);
  // From now on uploads of `bytes` in all find room while as many before them are under way: a host
  // that is at most one batch ahead never waits. Takes pinned memory of twice that size, 16 MiB at
  // least; waits when it needs more than before.
  void ReserveUploads(size_t bytes);
  // Waits for the stream, then copies.
  void Download(void* to, const void* from, size_t bytes);
  // In stream order, between or within device memory.
  void Copy(void* to, const void* from, size_t bytes) const;
  void Set(void* to, int byte, size_t bytes) const;

  // A place for the state of a library on this GPU (handles, workspaces), by the library's name. It
  // is destroyed before the stream is, and starts out empty.
  std::shared_ptr<void>& Library(const std::string& name) { return libraries_[name]; }

 private:
  // A range of the staging memory, free again when its event is done.
  struct Part {
    size_t begin, end;
    std::unique_ptr<Event> copied;
  };
  // The next `bytes` of staging memory, which is handed out round and round; waits only for copies
  // that are still under way there. Record the last part's event behind the copy.
  std::byte* Stage(size_t bytes);
  void RetireOldest();

  const int device_;
  const bool sync_checks_;
  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  std::byte* staging_ = nullptr;
  size_t staging_bytes_ = 0;
  std::deque<Part> staged_;  // oldest first
  std::vector<std::unique_ptr<Event>> free_events_;
  size_t next_staged_ = 0;
  std::map<std::string, std::shared_ptr<void>> libraries_;
};

}  // namespace longspan::cuda
