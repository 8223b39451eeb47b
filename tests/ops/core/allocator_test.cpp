#include "ops/core/allocator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "ops/core/context.h"

namespace longspan::test {
namespace {

TEST(AllocatorTest, PoisonedMemoryIsNan) {
  Context ctx({.device = {}, .threads = 1, .poison_buffers = true});
  const Tensor f32 = ctx.Empty({1000}, DType::kF32), f64 = ctx.Empty({1000}, DType::kF64);
  const Tensor bf16 = ctx.Empty({1000}, DType::kBF16);
  for (int64_t i = 0; i < 1000; ++i) {
    EXPECT_TRUE(std::isnan(f32.data<float>()[i])) << i;
    EXPECT_TRUE(std::isnan(f64.data<double>()[i])) << i;
    EXPECT_TRUE(std::isnan(static_cast<float>(bf16.data<BF16>()[i]))) << i;
  }
}

TEST(AllocatorTest, ReusedMemoryIsPoisonedAgain) {
  Allocator allocator(/*poison=*/true);
  for (int round = 0; round < 3; ++round) {
    auto* data = static_cast<unsigned char*>(allocator.Allocate(5000));
    for (size_t i = 0; i < 5000; ++i) ASSERT_EQ(data[i], 0xff) << i;
    std::memset(data, 0, 5000);
    allocator.Free(data, 5000);
  }
}

TEST(AllocatorTest, CountsAndAligns) {
  Allocator allocator;
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{4097}, size_t{70000}, size_t{1} << 20}) {
    void* data = allocator.Allocate(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0u) << bytes;
    EXPECT_GE(allocator.used_bytes(), bytes);
    EXPECT_GE(allocator.peak_bytes(), allocator.used_bytes());
    allocator.Free(data, bytes);
    EXPECT_EQ(allocator.used_bytes(), 0u);
  }
  allocator.Trim();
  EXPECT_EQ(allocator.cached_bytes(), 0u);
}

}  // namespace
}  // namespace longspan::test
