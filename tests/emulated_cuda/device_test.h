#pragma once
#include <gtest/gtest.h>

#include <vector>

#include "ops/core/cuda/launch.h"
#include "ops/core/error.h"
#include "tests/emulated_cuda/emulator.h"

namespace longspan::cuda {

// A stream on the emulated device and memory that lives as long as the test.
class DeviceTest : public testing::Test {
 protected:
  void TearDown() override {
    emulated::SetSeed(1);
    emulated::SetLag(0);
    emulated::Recover();
    for (void* block : blocks_) EXPECT_EQ(cudaFreeAsync(block, runtime_.stream()), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(runtime_.stream()), cudaSuccess) << emulated::Failure();
    emulated::Recover();
  }
  template <class T>
  T* Device(size_t n) {
    T* p = nullptr;
    LONGSPAN_CUDA(cudaMallocAsync(&p, n * sizeof(T), runtime_.stream()));
    blocks_.push_back(p);
    return p;
  }
  template <class T>
  T* Device(const std::vector<T>& values) {
    T* p = Device<T>(values.size());
    runtime_.Upload(p, values.data(), values.size() * sizeof(T));
    return p;
  }
  template <class T>
  std::vector<T> Host(const T* p, size_t n) {
    std::vector<T> v(n);
    runtime_.Download(v.data(), p, n * sizeof(T));
    return v;
  }
  // Of a kernel that has failed, with what its report says.
  void ExpectFailure(const std::string& part) {
    EXPECT_EQ(cudaStreamSynchronize(runtime_.stream()), cudaErrorLaunchFailure);
    EXPECT_NE(emulated::Failure().find(part), std::string::npos) << emulated::Failure();
    emulated::Recover();
    EXPECT_EQ(cudaStreamSynchronize(runtime_.stream()), cudaSuccess);
  }

  Runtime runtime_{0, false};

 private:
  std::vector<void*> blocks_;
};

}  // namespace longspan::cuda
