// Kernels on the emulated device: order of threads, collectives, shared memory, failures.
#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/launch.h"
#include "ops/core/cuda/reduce.cuh"
#include "tests/emulated_cuda/emulator.h"

namespace longspan::cuda {
namespace {

class BlockTest : public testing::Test {
 protected:
  void TearDown() override { emulated::Recover(); }
  template <class T>
  T* Device(size_t n) {
    T* p = nullptr;
    LONGSPAN_CUDA(cudaMalloc(&p, n * sizeof(T)));
    return p;
  }
  template <class T>
  std::vector<T> Host(const T* p, size_t n) {
    std::vector<T> v(n);
    runtime_.Download(v.data(), p, n * sizeof(T));
    return v;
  }
  Runtime runtime_{0, false};
};

__global__ void Index(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[i] = static_cast<int>(i) + out[i] * 0;
}

TEST_F(BlockTest, EveryThreadRunsOnce) {
  const dim3 grid(3, 4, 5), block(7, 3, 2);
  const size_t n = 60 * 42;
  int* out = Device<int>(n);
  runtime_.Set(out, 0, n * sizeof(int));
  Launch(runtime_, "Index", Index, {grid, block}, out);
  std::vector<int> expected(n);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(Host(out, n), expected);
}

__global__ void Sums(const float* in, float* out) {
  const float sum = BlockSum<256>(in[blockIdx.x * 256 + threadIdx.x]);
  out[blockIdx.x * 256 + threadIdx.x] = sum;
}

TEST_F(BlockTest, BlockSum) {
  const size_t n = 256 * 200;
  std::vector<float> values(n);
  for (size_t i = 0; i < n; ++i) values[i] = static_cast<float>(i % 97);
  float *in = Device<float>(n), *out = Device<float>(n);
  runtime_.Upload(in, values.data(), n * sizeof(float));
  Launch(runtime_, "Sums", Sums, {dim3(200), dim3(256)}, in, out);
  const std::vector<float> sums = Host(out, n);
  for (size_t b = 0; b < 200; ++b) {
    const float expected = std::accumulate(&values[b * 256], &values[b * 256] + 256, 0.0f);
    for (size_t t = 0; t < 256; ++t) ASSERT_EQ(sums[b * 256 + t], expected) << b << " " << t;
  }
}

}  // namespace
}  // namespace longspan::cuda
