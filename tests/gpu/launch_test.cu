#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "ops/core/context.h"
#include "ops/core/cuda/launch.h"
#include "tests/support/device.h"

namespace longspan::test {
namespace {

__global__ void SquaresKernel(int32_t* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = static_cast<int32_t>(i * i);
}

// The helper that starts kernels lives in the shared library; this kernel is in another binary.
// With a CUDA runtime of its own in each, this one would be unknown to the helper's.
TEST(LaunchTest, SmokeStartsAKernelOfAnotherBinary) {
  Context ctx({.device = {DeviceKind::kCuda, 0}});
  constexpr int64_t kN = 1000;  // no multiple of a block
  const Tensor out = ctx.Zeros({kN}, DType::kI32);
  cuda::Launch(ctx.cuda(), "Squares", SquaresKernel, cuda::Cover(kN), out.data<int32_t>(), kN);
  std::vector<int32_t> host(kN);
  CopyToHost(out, host.data());
  for (int64_t i = 0; i < kN; ++i) ASSERT_EQ(host[i], i * i);
}

}  // namespace
}  // namespace longspan::test
