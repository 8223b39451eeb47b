#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

// A CUDA device that is not there: kernels compiled by the host compiler run on host threads, so
// that the CUDA path is tested on any machine. What it emulates, and where it is stricter than a
// GPU so that mistakes show:
//   - Streams are threads with queues; a copy from pinned memory reads when its turn comes.
//   - Device memory, dynamic shared memory (of each block) and static shared memory (of each
//     launch) begin as 0xff bytes (NaN), and freed memory becomes so in stream order; until then it
//     counts as used. Writes past the end of either fail (with AddressSanitizer at once).
//   - Device memory can be read and written only while a stream works, unless the sanitizers are in
//     use: host code that does dies with a message.
//   - Threads of a block run in an order drawn anew after each barrier, blocks likewise, so that a
//     missing barrier changes results. Exited threads count as missing at a barrier.
//   - A kernel that can never end fails: stderr names it and what its threads wait for, and all
//     later calls return cudaErrorLaunchFailure, as after a fault on a GPU.
// Not emulated: rounding of the fast functions, memory limits of registers, speed.
//
// Environment, read once: LONGSPAN_EMULATED_SEED (of all orders, default 1),
// LONGSPAN_EMULATED_LAG_US (see SetLag), LONGSPAN_EMULATED_DEVICES (default 1),
// LONGSPAN_EMULATED_MEMORY_BYTES.
namespace longspan::emulated {

// Since the process began.
struct Counters {
  uint64_t launches = 0;
  uint64_t allocations = 0;       // of device memory
  uint64_t host_allocations = 0;  // of pinned memory
  uint64_t copies = 0;            // all memcpy calls
  uint64_t host_waits = 0;        // the host waited for a stream, event or device...
  uint64_t blocking_copies = 0;   // ...or a copy (also where CUDA only may wait: pageable memory)
};
Counters Count();
uint64_t LaunchesOf(const std::string& kernel);  // by the name that cuda::Launch was given

void SetSeed(uint64_t seed);
// Every item of every stream waits up to twice this long, at random, before it runs: what does not
// wait for it then sees old data.
void SetLag(int microseconds);
void SetDeviceCount(int devices);
void SetMemoryLimit(size_t bytes);  // of each device

enum class Fault {
  kDeviceMemory,  // an allocation of device memory returns cudaErrorMemoryAllocation
  kHostMemory,    // the same for pinned memory
  kLaunch,        // a launch returns cudaErrorLaunchOutOfResources; the device stays usable
  kKernel,        // a launch succeeds and its kernel fails while it runs
  kGemmChoice,    // cuBLASLt names an algorithm whose state says that it cannot be used
  kCopy,          // an asynchronous copy returns cudaErrorUnknown
};
// The next such call fails, or the one after `skip` others.
void FailNext(Fault fault, int skip = 0);

// Why the device failed; empty when it did not.
std::string Failure();
// Ends the failed state and forgets faults that have not happened, for the next test. Waits for all
// streams.
void Recover();

// For emulations of libraries that work on streams: `work` runs when its turn comes and may touch
// device memory. Errors: as a launch on `stream`.
cudaError_t Enqueue(cudaStream_t stream, std::function<void()> work);
// Ends in the failed state as a kernel that failed would; for use in `work`.
void FailDevice(const std::string& why);

// While it lives, this thread may touch device memory.
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};

enum class Place { kHost, kPinned, kDevice };
// Where memory lies.
struct Location {
  Place place = Place::kHost;
  int device = -1;
  bool whole = true;  // false: the range leaves the block that p lies in
};
Location Locate(const void* p, size_t bytes);

}  // namespace longspan::emulated
