#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

// Streams and events of the emulated devices, and what all of them share.

namespace longspan::emulated {

// A place in a stream that others can wait for.
struct Mark {
  std::atomic<uint32_t> done{0};
  double seconds = 0;  // when the stream got there; read only once it is done

  void Reach();
  void Wait() const { done.wait(0); }
};

// The failed state after a kernel that faulted: nothing but marks runs, all calls report it.
bool Failed();

cudaStream_t DefaultStream(int device);
int CurrentDevice();
int DeviceCount();
uint64_t Seed();
void CountHostWait();

// Waits until all streams of the device (-1: of all devices) have done what they were given.
void WaitForStreams(int device);

}  // namespace longspan::emulated

struct CUstream_st {
 public:
  CUstream_st(int device, unsigned flags, int priority);
  ~CUstream_st();  // after all work
  CUstream_st(const CUstream_st&) = delete;
  CUstream_st& operator=(const CUstream_st&) = delete;

  void Add(std::function<void()> work) { Add(Item{std::move(work)}); }
  // Runs in the failed state too.
  void AddAlways(std::function<void()> work) { Add({std::move(work), nullptr, nullptr, true}); }
  // For a host that waits: done when all work added before is and device memory is closed again,
  // unless another stream works.
  std::shared_ptr<longspan::emulated::Mark> AddMark();
  void AddMark(std::shared_ptr<longspan::emulated::Mark> mark) { Add({nullptr, std::move(mark)}); }
  void AddWait(std::shared_ptr<longspan::emulated::Mark> mark) {
    Add({nullptr, nullptr, std::move(mark)});
  }
  bool Idle();

  const int device, priority;
  const unsigned flags;
  std::atomic<uint64_t> launches{0};

 private:
  struct Item {
    std::function<void()> work;
    std::shared_ptr<longspan::emulated::Mark> reached = nullptr, awaited = nullptr;
    bool always = false, closes = false;
  };
  void Add(Item item);
  void Work();

  std::mutex mutex_;
  std::condition_variable added_;
  std::deque<Item> items_;
  bool ending_ = false, busy_ = false;
  std::thread worker_;
};

struct CUevent_st {
  explicit CUevent_st(bool is_timed) : timed(is_timed) {}
  const bool timed;
  std::mutex mutex;
  std::shared_ptr<longspan::emulated::Mark> last;  // recorded; null before

  std::shared_ptr<longspan::emulated::Mark> Last() {
    const std::lock_guard lock(mutex);
    return last;
  }
};
