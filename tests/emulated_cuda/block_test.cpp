// Kernels on the emulated device: threads, barriers, collectives of a warp, shared memory.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <set>

#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/reduce.cuh"
#include "tests/emulated_cuda/device_test.h"

namespace longspan::cuda {
namespace {

class BlockTest : public DeviceTest {};

__global__ void Index(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + 1000 * thread + 100000 * block;
}

TEST_F(BlockTest, EveryThreadRunsOnceWithItsIndex) {
  const dim3 grid(3, 4, 5), block(7, 3, 2);
  constexpr size_t kThreads = 42, kAll = 60 * kThreads;
  auto* out = Device<unsigned>(kAll);
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    emulated::SetSeed(seed);
    runtime_.Set(out, 0, kAll * sizeof(unsigned));
    Launch(runtime_, "Index", Index, {grid, block}, out);
    const std::vector<unsigned> got = Host(out, kAll);
    for (size_t i = 0; i < kAll; ++i) {
      ASSERT_EQ(got[i], 1 + 1000 * (i % kThreads) + 100000 * (i / kThreads));
    }
  }
}

TEST_F(BlockTest, GridsThatNoDeviceTakesAreRefused) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  EXPECT_EQ(GridSize(0), 0u);
  EXPECT_EQ(GridSize(kMost), 0x7fffffffu);
  EXPECT_EQ(Cover(kMost * 256).grid.x, 0x7fffffffu);
  EXPECT_THROW(GridSize(-1), InvalidArgument);
  for (const int64_t blocks : {kMost + 1, int64_t{1} << 32, (int64_t{1} << 32) + 5}) {
    EXPECT_THROW(GridSize(blocks), InvalidArgument) << blocks;
    EXPECT_THROW(Cover(blocks * 256), InvalidArgument) << blocks;
  }
}

// With sync_checks the launch itself says that its kernel failed; without, a later call does.
TEST_F(BlockTest, SyncChecksNameTheKernelThatFailed) {
  auto* out = Device<unsigned>(1);
  emulated::FailNext(emulated::Fault::kKernel);
  Launch(runtime_, "Index", Index, {dim3(1), dim3(1)}, out);
  EXPECT_EQ(cudaStreamSynchronize(runtime_.stream()), cudaErrorLaunchFailure);
  emulated::Recover();
  Runtime checked(0, true);
  emulated::FailNext(emulated::Fault::kKernel);
  try {
    Launch(checked, "Index", Index, {dim3(1), dim3(1)}, out);
    ADD_FAILURE() << "the launch said nothing";
  } catch (const CudaError& e) {
    EXPECT_NE(std::string(e.what()).find("Index"), std::string::npos) << e.what();
  }
  emulated::Recover();
}

__global__ void Sums(const float* in, float* out) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  out[i] = BlockSum<256>(in[i]);
}

TEST_F(BlockTest, SumsOverBarriersAndShuffles) {
  constexpr size_t kBlocks = 50, kAll = 256 * kBlocks;
  std::vector<float> values(kAll);
  for (size_t i = 0; i < kAll; ++i) values[i] = static_cast<float>(i % 97);
  const float* in = Device(values);
  auto* out = Device<float>(kAll);
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    emulated::SetSeed(seed);
    Launch(runtime_, "Sums", Sums, {dim3(kBlocks), dim3(256)}, in, out);
    const std::vector<float> sums = Host(out, kAll);
    for (size_t b = 0; b < kBlocks; ++b) {
      const float expected =
          std::accumulate(&values[b * 256], &values[b * 256] + 256, 0.0f);  // exact
      for (size_t t = 0; t < 256; ++t) ASSERT_EQ(sums[b * 256 + t], expected) << b << " " << t;
    }
  }
}

template <bool kBarrier>
__global__ void Reverse(const int* in, int* out) {
  __shared__ int values[128];
  values[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[127 - threadIdx.x];
}

TEST_F(BlockTest, MissingBarrierChangesTheResult) {
  std::vector<int> values(128);
  std::iota(values.begin(), values.end(), 1000);
  const std::vector<int> expected(values.rbegin(), values.rend());
  auto* out = Device<int>(128);
  std::set<std::vector<int>> without;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    emulated::SetSeed(seed);
    for (int& value : values) value += 128;  // so that what the last run left is wrong
    const int* in = Device(values);
    const std::vector<int> reversed(values.rbegin(), values.rend());
    Launch(runtime_, "Reverse", Reverse<true>, {dim3(1), dim3(128)}, in, out);
    EXPECT_EQ(Host(out, 128), reversed);
    Launch(runtime_, "Reverse", Reverse<true>, {dim3(1), dim3(128)}, Device(expected), out);
    Launch(runtime_, "Reverse", Reverse<false>, {dim3(1), dim3(128)}, in, out);
    std::vector<int> got = Host(out, 128);
    EXPECT_NE(got, reversed);
    for (int& value : got) value -= values[0];
    without.insert(got);
  }
  EXPECT_GT(without.size(), 2u);
}

__global__ void HalfAtBarrier(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  }
}
__global__ void ReturnBeforeShuffle(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void TwoShuffles(int* out) {
  out[threadIdx.x] =
      threadIdx.x < 16 ? __shfl_xor_sync(0xffffffffu, 1, 1) : __shfl_down_sync(0xffffffffu, 1, 1);
}
__global__ void NotInItsMask(int* out) { out[threadIdx.x] = __shfl_sync(0x7fffffffu, 1, 0); }
__global__ void BarrierInsideWarp(int* out) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  out[threadIdx.x] = __any_sync(0xffffffffu, 1);
}

TEST_F(BlockTest, CollectivesThatCannotEndAreReported) {
  auto* out = Device<int>(64);
  const LaunchShape two_warps{dim3(1), dim3(64)}, warp{dim3(1), dim3(32)};
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    emulated::SetSeed(seed);
    Launch(runtime_, "HalfAtBarrier", HalfAtBarrier, two_warps, out);
    ExpectFailure("of 64 threads 32 are at __syncthreads, 32 have returned");
    Launch(runtime_, "ReturnBeforeShuffle", ReturnBeforeShuffle, warp, out);
    ExpectFailure("which has returned");
    Launch(runtime_, "TwoShuffles", TwoShuffles, warp, out);
    ExpectFailure("is in __shfl_");
    Launch(runtime_, "NotInItsMask", NotInItsMask, warp, out);
    ExpectFailure("that does not name it");
    Launch(runtime_, "BarrierInsideWarp", BarrierInsideWarp, warp, out);
    ExpectFailure("16 are at __syncthreads");
    Launch(runtime_, "NotInItsMask", NotInItsMask, {dim3(1), dim3(20)}, out);
    ExpectFailure("which does not exist");
  }
  // Stacks and barriers that failed kernels left are in order again.
  Launch(runtime_, "Index", Index, {dim3(1), dim3(64)}, reinterpret_cast<unsigned*>(out));
  EXPECT_EQ(cudaStreamSynchronize(runtime_.stream()), cudaSuccess);
}

TEST_F(BlockTest, FailureStaysUntilRecovered) {
  auto* out = Device<int>(64);
  Launch(runtime_, "HalfAtBarrier", HalfAtBarrier, {dim3(2), dim3(64)}, out);
  EXPECT_THROW(runtime_.Synchronize(), CudaError);
  EXPECT_THROW(runtime_.Set(out, 0, 4), CudaError);
  EXPECT_THROW(
      Launch(runtime_, "Index", Index, {dim3(1), dim3(1)}, reinterpret_cast<unsigned*>(out)),
      CudaError);
  EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchFailure);
  EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchFailure);
  EXPECT_NE(emulated::Failure().find("kernel HalfAtBarrier"), std::string::npos);
  emulated::Recover();
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  runtime_.Set(out, 0, 4);
  EXPECT_EQ(Host(out, 1)[0], 0);
}

// All shuffles of one warp: value = 100 + lane, as f32, i32 and i64.
template <class T>
__global__ void Shuffles(T* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const T value = static_cast<T>(100 + lane);
  T* mine = out + lane * 6;
  mine[0] = __shfl_sync(0xffffffffu, value, 7);
  mine[1] = __shfl_sync(0xffffffffu, value, lane + 3, 8);
  mine[2] = __shfl_up_sync(0xffffffffu, value, 5);
  mine[3] = __shfl_down_sync(0xffffffffu, value, 2, 16);
  mine[4] = __shfl_xor_sync(0xffffffffu, value, 9);
  mine[5] = -1;
  if (lane % 2 == 1) mine[5] = __shfl_xor_sync(0xaaaaaaaau, value, 2);
}

TEST_F(BlockTest, ShufflesFollowTheirDefinitions) {
  const auto check = [&]<class T>(T) {
    auto* out = Device<T>(32 * 6);
    Launch(runtime_, "Shuffles", Shuffles<T>, {dim3(1), dim3(32)}, out);
    const std::vector<T> got = Host(out, 32 * 6);
    for (int lane = 0; lane < 32; ++lane) {
      const int down = lane % 16 + 2 < 16 ? lane + 2 : lane;
      const int expected[6] = {107,
                               100 + lane / 8 * 8 + (lane + 3) % 8,
                               lane < 5 ? 100 + lane : 95 + lane,
                               100 + down,
                               100 + (lane ^ 9),
                               lane % 2 == 1 ? 100 + (lane ^ 2) : -1};
      for (int i = 0; i < 6; ++i) EXPECT_EQ(got[lane * 6 + i], expected[i]) << lane << " " << i;
    }
  };
  check(int{});
  check(float{});
  check(double{});
  check((long long){});
}

__global__ void Votes(const int* in, unsigned* out) {
  const int value = in[threadIdx.x];
  out[threadIdx.x * 8 + 0] = __ballot_sync(0xffffffffu, value % 3 == 0);
  out[threadIdx.x * 8 + 1] = static_cast<unsigned>(__any_sync(0xffffffffu, value == 40));
  out[threadIdx.x * 8 + 2] = static_cast<unsigned>(__any_sync(0xffffffffu, value == 1000));
  out[threadIdx.x * 8 + 3] = static_cast<unsigned>(__all_sync(0xffffffffu, value >= 0));
  out[threadIdx.x * 8 + 4] = static_cast<unsigned>(__all_sync(0xffffffffu, value != 40));
  out[threadIdx.x * 8 + 5] = static_cast<unsigned>(__syncthreads_count(value % 5 == 0));
  out[threadIdx.x * 8 + 6] = static_cast<unsigned>(__syncthreads_or(value == 1000));
  out[threadIdx.x * 8 + 7] = static_cast<unsigned>(__syncthreads_and(value < 1000));
}

TEST_F(BlockTest, VotesFollowTheirDefinitions) {
  std::vector<int> values(64);
  std::iota(values.begin(), values.end(), 0);
  const int* in = Device(values);
  auto* out = Device<unsigned>(64 * 8);
  Launch(runtime_, "Votes", Votes, {dim3(1), dim3(64)}, in, out);
  const std::vector<unsigned> got = Host(out, 64 * 8);
  for (unsigned t = 0; t < 64; ++t) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((t / 32 * 32 + lane) % 3 == 0) ballot |= 1u << lane;
    }
    const bool second = t >= 32;  // the warp of thread 40
    const std::vector<unsigned> expected = {ballot, second, 0, 1, !second, 13, 0, 1};
    EXPECT_EQ(std::vector<unsigned>(&got[t * 8], &got[t * 8] + 8), expected) << t;
  }
}

__global__ void WriteShared(int bytes, int written, float* out) {
  LONGSPAN_DYNAMIC_SHARED(shared);
  LONGSPAN_DYNAMIC_SHARED(same);
  const auto* values = reinterpret_cast<const float*>(same);
  float fresh = 0;
  for (int i = 0; i < bytes / 4; ++i) fresh += isnan(values[i]) ? 1 : 0;
  if (threadIdx.x == 0) out[blockIdx.x] = fresh;
  __syncthreads();
  for (int i = 0; i < written; ++i) shared[i] = std::byte{1};
}

TEST_F(BlockTest, DynamicSharedMemoryIsFreshAndGuarded) {
  auto* out = Device<float>(3);
  for (const size_t bytes : {size_t{4096}, size_t{100 * 1024}, size_t{232448}}) {
    const LaunchShape shape{dim3(3), dim3(32), bytes};
    const int n = static_cast<int>(bytes);
    Launch(runtime_, "WriteShared", WriteShared, shape, n, n, out);
    const auto count = static_cast<float>(bytes / 4);
    EXPECT_EQ(Host(out, 3), std::vector<float>(3, count)) << bytes;
#ifndef __SANITIZE_ADDRESS__  // which ends the process at the first such write
    if (bytes == 232448) continue;
    Launch(runtime_, "WriteShared", WriteShared, shape, n, n + 1, out);
    ExpectFailure("wrote to byte " + std::to_string(bytes));
#endif
  }
}

template <class T>
__global__ void ReadStaticShared(T* out) {
  __shared__ T values[40];
  out[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = static_cast<T>(threadIdx.x);
}

TEST_F(BlockTest, StaticSharedMemoryIsFreshForEachKernel) {
  auto* out = Device<int>(40);
  auto* wide = Device<long long>(40);
  for (int i = 0; i < 2; ++i) {
    Launch(runtime_, "ReadStaticShared", ReadStaticShared<int>, {dim3(1), dim3(40)}, out);
    EXPECT_EQ(Host(out, 40), std::vector<int>(40, -1));
    Launch(runtime_, "ReadStaticShared", ReadStaticShared<long long>, {dim3(1), dim3(40)}, wide);
    EXPECT_EQ(Host(wide, 40), std::vector<long long>(40, -1));
  }
}

#ifndef __SANITIZE_ADDRESS__
struct Mixed {
  int count;
  const float* values;
};
__global__ void TakePointer(const float*, int) {}
__global__ void TakeStruct(Mixed, double) {}
struct Padded {
  const float* values;
  unsigned number;  // 4 bytes follow that belong to nothing
};
__global__ void TakePadded(Padded) {}

TEST_F(BlockTest, HostPointersAmongArgumentsAreReported) {
  // Those inside structs are missed where they end in a byte 0 or 1 (arguments.cpp), as one stack
  // in sixteen does.
  constexpr size_t kPastByte0 = 16 / sizeof(float);
  const auto on_heap = std::make_unique<float[]>(64 + kPastByte0);
  alignas(256) float on_stack[2 * kPastByte0] = {};
  float* heap = on_heap.get();
  while (reinterpret_cast<uintptr_t>(heap) % 256 == 0) heap += kPastByte0;
  auto* on_device = Device<float>(3);
  const LaunchShape one{dim3(1), dim3(1)};
  Launch(runtime_, "TakePointer", TakePointer, one, on_device + 3, 3);
  Launch(runtime_, "TakePointer", TakePointer, one, nullptr, 3);
  Launch(runtime_, "TakeStruct", TakeStruct, one, Mixed{1, on_device}, 1.0);
  runtime_.Synchronize();
  for (const float* host : std::initializer_list<const float*>{heap, on_stack + kPastByte0}) {
    EXPECT_THROW(Launch(runtime_, "TakePointer", TakePointer, one, host, 3), CudaError);
    ExpectFailure("kernel TakePointer: argument 1 is a pointer to host memory");
    EXPECT_THROW(Launch(runtime_, "TakeStruct", TakeStruct, one, Mixed{1, host}, 1.0), CudaError);
    ExpectFailure("kernel TakeStruct: argument 1, at byte 8 of 16, is a pointer to host memory");
  }
}

#if __has_builtin(__builtin_clear_padding)
TEST_F(BlockTest, PaddingOfArgumentsIsNoPointer) {
  const auto on_heap = std::make_unique<float[]>(64);
  float* heap = on_heap.get() + 1;
  if (reinterpret_cast<uintptr_t>(heap) % 256 <= 1) ++heap;
  Padded padded{};
  std::memcpy(reinterpret_cast<std::byte*>(&padded) + offsetof(Padded, number), &heap,
              sizeof(heap));
  Launch(runtime_, "TakePadded", TakePadded, LaunchShape{dim3(1), dim3(1)}, padded);
  runtime_.Synchronize();
}
#endif
#endif

TEST_F(BlockTest, LaunchesAreChecked) {
  auto* out = Device<unsigned>(1);
  EmulatedKernel bound{"Index", [out] { Index(out); }};
  void* arguments[] = {&bound};
  const auto launch = [&](dim3 grid, dim3 block, size_t shared) {
    const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(&Index), grid, block,
                                               arguments, shared, runtime_.stream());
    cudaGetLastError();
    return error;
  };
  EXPECT_EQ(launch(dim3(1), dim3(1), 0), cudaSuccess);
  EXPECT_EQ(launch(dim3(1, 65536), dim3(1), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), dim3(1025), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(0), dim3(1), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), dim3(1), 48 * 1024 + 1), cudaErrorInvalidValue);  // not asked for
  EXPECT_EQ(cudaFuncSetAttribute(&Index, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449),
            cudaErrorInvalidValue);
  cudaGetLastError();
}

// Half of what the tests of a big op launch; it takes about 0.2 s.
TEST_F(BlockTest, ManySmallLaunches) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr int kLaunches = 100;
#else
  constexpr int kLaunches = 3000;
#endif
  auto* out = Device<unsigned>(256 * 4);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kLaunches; ++i) {
    Launch(runtime_, "Index", Index, {dim3(4), dim3(256)}, out);
  }
  runtime_.Synchronize();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  RecordProperty("seconds", std::to_string(took.count()));
  EXPECT_LT(took.count(), 30);
}

}  // namespace
}  // namespace longspan::cuda
