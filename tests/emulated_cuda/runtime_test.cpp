// Runtime, launches and memory of a GPU, where they meet its limits.
#include "ops/core/allocator.h"
#include "tests/emulated_cuda/device_test.h"

namespace longspan::cuda {
namespace {

class RuntimeTest : public DeviceTest {};

__global__ void Nothing() {}

// A kernel's static shared memory counts too: above 32 KiB of dynamic memory it has to ask.
TEST_F(RuntimeTest, LaunchesAskForMuchSharedMemory) {
  for (const size_t bytes : {size_t{32} << 10, size_t{48} << 10, size_t{100} << 10}) {
    Launch(runtime_, "Nothing", Nothing, {dim3(1), dim3(1), bytes});
    runtime_.Synchronize();
  }
  EXPECT_THROW(Launch(runtime_, "Nothing", Nothing, {dim3(1), dim3(1), size_t{1} << 20}),
               InvalidArgument);
}

// Two large batches go up while the stream is busy with what came before.
TEST_F(RuntimeTest, UploadsOfTheReservedSizeNeverWait) {
  constexpr size_t kPieces[] = {(size_t{20} << 20) + 4, (size_t{19} << 20) + 12, 4};
  std::vector<unsigned char> host(kPieces[0]);
  unsigned char* device = Device<unsigned char>(kPieces[0]);
  const auto upload = [&] {
    for (const size_t bytes : kPieces) runtime_.Upload(device, host.data(), bytes);
  };
  runtime_.ReserveUploads(kPieces[0] + kPieces[1] + kPieces[2]);
  for (int offset = 0; offset < 3; ++offset) {  // the batches begin elsewhere in the memory
    runtime_.Upload(device, host.data(), (size_t{5} << 20) + 1);
    runtime_.Synchronize();
    emulated::SetLag(2000);
    for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<unsigned char>(i * 7 + i / 251);
    const emulated::Counters before = emulated::Count();
    upload();
    upload();
    const emulated::Counters after = emulated::Count();
    EXPECT_EQ(after.host_waits, before.host_waits);
    EXPECT_EQ(after.host_allocations, before.host_allocations);
    emulated::SetLag(0);
    EXPECT_TRUE(Host(device + 4, kPieces[1] - 4) ==
                std::vector<unsigned char>(host.begin() + 4, host.begin() + kPieces[1]));
  }
  // Reserving in the middle of things keeps them.
  upload();
  runtime_.ReserveUploads(size_t{60} << 20);
  upload();
  EXPECT_TRUE(Host(device, kPieces[0]) == host);
  const emulated::Counters before = emulated::Count();
  runtime_.ReserveUploads(size_t{10} << 20);
  EXPECT_EQ(emulated::Count().host_allocations, before.host_allocations);
}

TEST_F(RuntimeTest, AskingWhetherAnEventIsDoneLeavesNoError) {
  emulated::SetLag(5000);
  Event event;
  Launch(runtime_, "Nothing", Nothing, {dim3(1), dim3(1)});
  event.Record(runtime_.stream());
  while (!event.Done()) EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

// Memory that was returned counts as used until the stream has got there.
TEST_F(RuntimeTest, WhatWasReturnedIsWaitedForBeforeGivingUp) {
  const auto runtime = std::make_shared<Runtime>(0, false);
  size_t free_bytes = 0, total = 0;
  LONGSPAN_CUDA(cudaMemGetInfo(&free_bytes, &total));
  {
    const std::unique_ptr<MemorySource> memory = DeviceMemory(runtime);
    constexpr size_t kHalf = size_t{4} << 20;
    emulated::SetMemoryLimit(total - free_bytes + kHalf + kHalf / 2);
    emulated::SetLag(20000);
    void* first = memory->Get(kHalf);
    ASSERT_NE(first, nullptr);
    Launch(*runtime, "Nothing", Nothing, {dim3(1), dim3(1)});
    memory->Return(first);
    void* second = memory->Get(kHalf + 1);
    EXPECT_NE(second, nullptr);
    EXPECT_EQ(memory->Get(kHalf), nullptr);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    memory->Return(second);
    runtime->Synchronize();
  }
  emulated::SetMemoryLimit(total);
}

}  // namespace
}  // namespace longspan::cuda
