// Streams, events, copies and memory of the emulated device.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>

#include "tests/emulated_cuda/device_test.h"

namespace longspan::cuda {
namespace {

class StreamTest : public DeviceTest {
 protected:
  // A second stream.
  struct Stream {
    cudaStream_t stream = nullptr;
    Stream() { LONGSPAN_CUDA(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, -5)); }
    ~Stream() { cudaStreamDestroy(stream); }
  };
  // Holds a stream at its place until opened.
  struct Gate {
    std::atomic<bool> open{false};
    void Hold(cudaStream_t stream) {
      LONGSPAN_CUDA(cudaLaunchHostFunc(
          stream,
          [](void* gate) {
            while (!static_cast<Gate*>(gate)->open) std::this_thread::yield();
          },
          this));
    }
  };
  template <class T>
  struct Pinned {
    T* data = nullptr;
    explicit Pinned(size_t n) {
      LONGSPAN_CUDA(cudaHostAlloc(&data, n * sizeof(T), cudaHostAllocDefault));
    }
    ~Pinned() { cudaFreeHost(data); }
  };
};

__global__ void Increment(int* value) { *value += 1; }
__global__ void CopyOne(const int* from, int* to) { *to = *from; }

TEST_F(StreamTest, WorkIsAsynchronousAndInOrder) {
  int* value = Device(std::vector<int>{5});
  Gate gate;
  gate.Hold(runtime_.stream());
  const uint64_t launches = emulated::LaunchesOf("Increment");
  for (int i = 0; i < 10; ++i) Launch(runtime_, "Increment", Increment, Cover(1, 1), value);
  EXPECT_EQ(emulated::LaunchesOf("Increment") - launches, 10u);
  EXPECT_EQ(cudaStreamQuery(runtime_.stream()), cudaErrorNotReady);  // the host went on
  gate.open = true;
  EXPECT_EQ(Host(value, 1)[0], 15);
  EXPECT_EQ(cudaStreamQuery(runtime_.stream()), cudaSuccess);
}

TEST_F(StreamTest, PinnedMemoryIsReadInOrderAndPageableAtTheCall) {
  int* target = Device(std::vector<int>{0, 0});
  Pinned<int> pinned(1);
  std::vector<int> pageable = {1};
  *pinned.data = 1;
  Gate gate;
  gate.Hold(runtime_.stream());
  const emulated::Counters before = emulated::Count();
  LONGSPAN_CUDA(cudaMemcpyAsync(target, pinned.data, 4, cudaMemcpyHostToDevice, runtime_.stream()));
  EXPECT_EQ(emulated::Count().blocking_copies, before.blocking_copies);
  LONGSPAN_CUDA(
      cudaMemcpyAsync(target + 1, pageable.data(), 4, cudaMemcpyHostToDevice, runtime_.stream()));
  EXPECT_EQ(emulated::Count().blocking_copies, before.blocking_copies + 1);
  *pinned.data = 2;  // too early for the first copy
  pageable[0] = 2;
  gate.open = true;
  EXPECT_EQ(Host(target, 2), (std::vector<int>{2, 1}));
}

TEST_F(StreamTest, CopyToPageableMemoryBlocks) {
  const int* source = Device(std::vector<int>{7});
  emulated::SetLag(2000);
  int target = 0;
  const uint64_t before = emulated::Count().blocking_copies;
  LONGSPAN_CUDA(cudaMemcpyAsync(&target, source, 4, cudaMemcpyDeviceToHost, runtime_.stream()));
  EXPECT_EQ(target, 7);
  EXPECT_EQ(emulated::Count().blocking_copies, before + 1);
}

TEST_F(StreamTest, EventsOrderStreams) {
  Stream other;
  int* from = Device(std::vector<int>{1});
  int* to = Device(std::vector<int>{0});
  runtime_.Synchronize();
  Event done;
  const auto copy_to_other = [&](bool wait) {
    Gate gate;
    gate.Hold(runtime_.stream());
    Launch(runtime_, "Increment", Increment, Cover(1, 1), from);
    done.Record(runtime_.stream());
    EXPECT_FALSE(done.Done());
    if (wait) done.Wait(other.stream);
    LaunchShape shape = Cover(1, 1);
    shape.stream = other.stream;
    Launch(runtime_, "CopyOne", CopyOne, shape, from, to);
    if (!wait) LONGSPAN_CUDA(cudaStreamSynchronize(other.stream));
    gate.open = true;
    LONGSPAN_CUDA(cudaStreamSynchronize(other.stream));
    LONGSPAN_CUDA(cudaStreamSynchronize(runtime_.stream()));
    EXPECT_TRUE(done.Done());
    return Host(to, 1)[0];
  };
  EXPECT_EQ(copy_to_other(true), 2);
  EXPECT_EQ(copy_to_other(false), 2);  // the streams are independent: the old value
  EXPECT_EQ(copy_to_other(true), 4);
}

TEST_F(StreamTest, WaitIsForWhatWasRecordedBeforeIt) {
  Stream other;
  Event event;
  event.Wait(other.stream);  // never recorded: no wait
  EXPECT_EQ(cudaStreamSynchronize(other.stream), cudaSuccess);
  EXPECT_TRUE(event.Done());
  event.Record(runtime_.stream());
  event.Wait(other.stream);
  Gate gate;
  gate.Hold(runtime_.stream());
  event.Record(runtime_.stream());  // too late for the wait
  EXPECT_EQ(cudaStreamSynchronize(other.stream), cudaSuccess);
  EXPECT_FALSE(event.Done());
  gate.open = true;
  event.Synchronize();
  EXPECT_TRUE(event.Done());
}

TEST_F(StreamTest, EventsMeasureTime) {
  Event begin(true), end(true), untimed;
  begin.Record(runtime_.stream());
  emulated::SetLag(0);
  LONGSPAN_CUDA(cudaLaunchHostFunc(
      runtime_.stream(), [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(5)); },
      nullptr));
  end.Record(runtime_.stream());
  end.Synchronize();
  EXPECT_GE(end.MillisecondsSince(begin), 5.0f);
  EXPECT_LT(end.MillisecondsSince(begin), 5000.0f);
  untimed.Record(runtime_.stream());
  EXPECT_THROW(end.MillisecondsSince(untimed), CudaError);
  cudaGetLastError();
}

TEST_F(StreamTest, LagShowsAMissingWait) {
  Stream other;
  int* value = Device(std::vector<int>{0});
  int* seen = Device(std::vector<int>{0});
  runtime_.Synchronize();
  emulated::SetLag(300);
  int stale = 0;
  for (int i = 0; i < 40; ++i) {
    Launch(runtime_, "Increment", Increment, Cover(1, 1), value);
    LaunchShape shape = Cover(1, 1);
    shape.stream = other.stream;
    Launch(runtime_, "CopyOne", CopyOne, shape, value, seen);
    LONGSPAN_CUDA(cudaDeviceSynchronize());
    stale += Host(seen, 1)[0] != i + 1;
  }
  EXPECT_GT(stale, 0);
}

TEST_F(StreamTest, FreeIsInStreamOrderAndPoisons) {
  int *block = nullptr, *copy = Device<int>(2);
  LONGSPAN_CUDA(cudaMallocAsync(&block, 4, runtime_.stream()));
  Gate gate;
  gate.Hold(runtime_.stream());
  runtime_.Set(block, 1, 4);
  Launch(runtime_, "CopyOne", CopyOne, Cover(1, 1), block, copy);
  LONGSPAN_CUDA(cudaFreeAsync(block, runtime_.stream()));
  EXPECT_EQ(cudaFreeAsync(block, runtime_.stream()), cudaErrorInvalidValue);  // twice
  cudaGetLastError();
#ifndef __SANITIZE_ADDRESS__
  Launch(runtime_, "CopyOne", CopyOne, Cover(1, 1), block, copy + 1);  // after its end
#endif
  gate.open = true;
  const std::vector<int> got = Host(copy, 2);
  EXPECT_EQ(got[0], 0x01010101);
  EXPECT_EQ(got[1], -1);
}

TEST_F(StreamTest, FreshMemoryIsPoisonAndHasALimit) {
  EXPECT_EQ(Host(Device<int>(100), 100), std::vector<int>(100, -1));
  size_t free_bytes = 0, total = 0;
  LONGSPAN_CUDA(cudaMemGetInfo(&free_bytes, &total));
  const size_t used = total - free_bytes;
  emulated::SetMemoryLimit(used + 1000);
  void *first = nullptr, *second = nullptr;
  EXPECT_EQ(cudaMallocAsync(&first, 900, runtime_.stream()), cudaSuccess);
  EXPECT_EQ(cudaMallocAsync(&second, 101, runtime_.stream()), cudaErrorMemoryAllocation);
  EXPECT_EQ(second, nullptr);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);  // not sticky
  // A pool may be unable to reuse what the stream has yet to free: here it always is.
  Gate gate;
  gate.Hold(runtime_.stream());
  LONGSPAN_CUDA(cudaFreeAsync(first, runtime_.stream()));
  EXPECT_EQ(cudaMallocAsync(&second, 1000, runtime_.stream()), cudaErrorMemoryAllocation);
  cudaGetLastError();
  gate.open = true;
  runtime_.Synchronize();
  EXPECT_EQ(cudaMallocAsync(&second, 1000, runtime_.stream()), cudaSuccess);
  LONGSPAN_CUDA(cudaFreeAsync(second, runtime_.stream()));
  emulated::SetMemoryLimit(total);
}

#ifndef __SANITIZE_ADDRESS__  // which ends the process at the write
__global__ void WriteAt(char* block, int64_t at) { block[at] = 1; }

TEST_F(StreamTest, WritesPastABlockAreFoundWhenItIsFreed) {
  for (const int64_t at : {int64_t{99}, int64_t{100}, int64_t{300}}) {
    char* block = nullptr;
    LONGSPAN_CUDA(cudaMallocAsync(&block, 100, runtime_.stream()));
    Launch(runtime_, "WriteAt", WriteAt, Cover(1, 1), block, at);
    LONGSPAN_CUDA(cudaFreeAsync(block, runtime_.stream()));
    if (at < 100) {
      EXPECT_EQ(cudaStreamSynchronize(runtime_.stream()), cudaSuccess);
    } else {
      ExpectFailure("memory after the end of a block");
    }
  }
}
#endif

TEST_F(StreamTest, CopiesCheckTheirSides) {
  int* device = Device(std::vector<int>{1, 2, 3});
  std::vector<int> host(3);
  const auto copy = [&](void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, runtime_.stream());
    cudaGetLastError();
    return error;
  };
  EXPECT_EQ(copy(host.data(), device, 12, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(host, (std::vector<int>{1, 2, 3}));
  EXPECT_EQ(copy(host.data(), device, 12, cudaMemcpyDefault), cudaSuccess);
  for (const auto wrong :
       {cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice, cudaMemcpyHostToHost}) {
    EXPECT_EQ(copy(host.data(), device, 12, wrong), cudaErrorInvalidMemcpyDirection) << wrong;
  }
  EXPECT_EQ(copy(device, host.data(), 12, cudaMemcpyDeviceToHost), cudaErrorInvalidMemcpyDirection);
  EXPECT_EQ(copy(device, host.data(), 13, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(copy(device + 1, device, 12, cudaMemcpyDeviceToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(host.data(), 0, 4, runtime_.stream()), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(device, 0, 13, runtime_.stream()), cudaErrorInvalidValue);
  cudaGetLastError();
}

TEST_F(StreamTest, CopiesRows) {
  std::vector<int> values(20);
  std::iota(values.begin(), values.end(), 0);
  const int* from = Device(values);  // 4 x 5
  int* to = Device<int>(12);         // 4 x 3
  LONGSPAN_CUDA(
      cudaMemcpy2DAsync(to, 12, from + 1, 20, 8, 4, cudaMemcpyDeviceToDevice, runtime_.stream()));
  const std::vector<int> got = Host(to, 12);
  for (int row = 0; row < 4; ++row) {
    EXPECT_EQ(got[row * 3], row * 5 + 1);
    EXPECT_EQ(got[row * 3 + 1], row * 5 + 2);
    EXPECT_EQ(got[row * 3 + 2], -1);
  }
  EXPECT_EQ(cudaMemcpy2DAsync(to, 4, from, 20, 8, 4, cudaMemcpyDeviceToDevice, runtime_.stream()),
            cudaErrorInvalidPitchValue);
  cudaGetLastError();
}

TEST_F(StreamTest, FaultsHappenWhenAskedFor) {
  int* value = Device(std::vector<int>{0});
  const auto increment = [&] { Launch(runtime_, "Increment", Increment, Cover(1, 1), value); };
  emulated::FailNext(emulated::Fault::kLaunch, 1);
  increment();
  EXPECT_THROW(increment(), CudaError);
  cudaGetLastError();
  increment();
  EXPECT_EQ(Host(value, 1)[0], 2);
  emulated::FailNext(emulated::Fault::kDeviceMemory);
  EXPECT_THROW(Device<int>(1), CudaError);
  cudaGetLastError();
  emulated::FailNext(emulated::Fault::kCopy);
  EXPECT_THROW(runtime_.Upload(value, "1234", 4), CudaError);
  cudaGetLastError();
  emulated::FailNext(emulated::Fault::kHostMemory);
  EXPECT_THROW(Pinned<int>(4), CudaError);
  cudaGetLastError();
  emulated::FailNext(emulated::Fault::kKernel);
  increment();
  ExpectFailure("kernel Increment");
  EXPECT_EQ(Host(value, 1)[0], 2);
}

TEST_F(StreamTest, CountsWhatTheHostDoes) {
  const emulated::Counters a = emulated::Count();
  int* value = Device(std::vector<int>{0});  // one allocation, one copy through pinned memory
  Launch(runtime_, "Increment", Increment, Cover(1, 1), value);
  const emulated::Counters b = emulated::Count();
  EXPECT_EQ(b.allocations - a.allocations, 1u);
  EXPECT_EQ(b.copies - a.copies, 1u);
  EXPECT_EQ(b.launches - a.launches, 1u);
  EXPECT_EQ(b.host_waits - a.host_waits, 0u);
  EXPECT_EQ(b.blocking_copies - a.blocking_copies, 0u);
  runtime_.Synchronize();
  LONGSPAN_CUDA(cudaDeviceSynchronize());
  Event event;
  event.Record(runtime_.stream());
  event.Synchronize();
  const emulated::Counters c = emulated::Count();
  EXPECT_EQ(c.host_waits - b.host_waits, 3u);
}

TEST_F(StreamTest, DevicesAreSeparate) {
  emulated::SetDeviceCount(2);
  {
    Runtime second(1, false);
    EXPECT_THROW(Runtime(2, false), CudaError);
    void* block = nullptr;
    LONGSPAN_CUDA(cudaSetDevice(1));
    LONGSPAN_CUDA(cudaMallocAsync(&block, 64, second.stream()));
    cudaPointerAttributes where;
    LONGSPAN_CUDA(cudaPointerGetAttributes(&where, block));
    EXPECT_EQ(where.type, cudaMemoryTypeDevice);
    EXPECT_EQ(where.device, 1);
    LONGSPAN_CUDA(cudaFreeAsync(block, second.stream()));
  }
  emulated::SetDeviceCount(0);
  std::string why;
  EXPECT_EQ(DeviceCount(&why), 0);
  EXPECT_EQ(why, "no CUDA-capable device is detected");
  emulated::SetDeviceCount(1);
  LONGSPAN_CUDA(cudaSetDevice(0));
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
using StreamDeathTest = StreamTest;
TEST_F(StreamDeathTest, HostCodeThatTouchesDeviceMemoryDies) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const volatile int* value = Device(std::vector<int>{1});
  runtime_.Synchronize();
  EXPECT_EXIT(static_cast<void>(*value), testing::KilledBySignal(SIGSEGV),
              "host code touched device memory");
  int read = 0;
  {
    const emulated::DeviceAccess access;
    read = *value;
  }
  EXPECT_EQ(read, 1);
}
#endif

}  // namespace
}  // namespace longspan::cuda
