#include "ops/core/allocator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "ops/core/context.h"
#include "tests/ops/op_test.h"

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

TEST(AllocatorTest, PeakIsKnownByCategory) {
  Context ctx({.device = {}, .threads = 1});
  Allocator& allocator = ctx.allocator();
  constexpr int64_t kMega = int64_t{1} << 20;
  const auto at = [](const BytesByCategory& bytes, MemoryCategory category) {
    return bytes[static_cast<size_t>(category)];
  };
  Tensor weights, state;
  {
    const MemoryScope scope(allocator, MemoryCategory::kParameters);
    weights = ctx.Empty({3 * kMega}, DType::kU8);
    {
      const MemoryScope inner(allocator, MemoryCategory::kOptimizer);
      state = ctx.Empty({2 * kMega}, DType::kU8);
    }
    EXPECT_EQ(allocator.category(), MemoryCategory::kParameters);
  }
  EXPECT_EQ(allocator.category(), MemoryCategory::kActivations);
  { const Tensor activations = ctx.Empty({8 * kMega}, DType::kU8); }
  // Given back in another scope than it was taken in.
  {
    const MemoryScope scope(allocator, MemoryCategory::kGradients),
        state2(allocator, MemoryCategory::kStaging);
    state = Tensor();
  }
  const Tensor small = ctx.Empty({kMega}, DType::kU8);
  const BytesByCategory peak = allocator.peak_by_category();
  EXPECT_EQ(at(peak, MemoryCategory::kParameters), size_t{3} << 20);
  EXPECT_EQ(at(peak, MemoryCategory::kOptimizer), size_t{2} << 20);
  EXPECT_EQ(at(peak, MemoryCategory::kActivations), size_t{8} << 20);
  EXPECT_EQ(at(peak, MemoryCategory::kGradients), 0u);
  size_t sum = 0;
  for (const size_t bytes : peak) sum += bytes;
  EXPECT_EQ(sum, allocator.peak_bytes());
  EXPECT_EQ(allocator.used_bytes(), size_t{4} << 20);
  void* block = allocator.Allocate(size_t{20} << 20, MemoryCategory::kWorkspace);
  EXPECT_EQ(allocator.peak_bytes(), size_t{24} << 20);
  EXPECT_EQ(at(allocator.peak_by_category(), MemoryCategory::kWorkspace), size_t{20} << 20);
  allocator.Free(block, size_t{20} << 20, MemoryCategory::kWorkspace);
}

TEST(TensorTest, RangesAreReadAndWritten) {
  Context ctx = OpContext();
  std::vector<float> values(100), got(40);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  Tensor t = ctx.Empty({10, 10}, DType::kF32);
  t.WriteFrom(values.data());
  t.Rows(2, 6).ReadTo(got.data());
  EXPECT_EQ(got, std::vector<float>(values.begin() + 20, values.begin() + 60));
  const float two[2] = {-1, -2};
  t.WriteRange(8, 8, two);
  t.ReadRange(0, 20, got.data());
  EXPECT_EQ((std::vector<float>{got.begin(), got.begin() + 5}),
            (std::vector<float>{0, 1, -1, -2, 4}));
  EXPECT_THROW(t.ReadRange(396, 8, got.data()), InvalidArgument);
  EXPECT_THROW(t.WriteRange(400, 1, got.data()), InvalidArgument);
  // More than the staging memory of a GPU holds, with a remainder.
  std::vector<unsigned char> large((size_t{35} << 20) + 7), back(large.size());
  for (size_t i = 0; i < large.size(); ++i)
    large[i] = static_cast<unsigned char>(i * 2654435761u >> 13);
  const Tensor bytes = ctx.Empty({static_cast<int64_t>(large.size())}, DType::kU8);
  bytes.WriteFrom(large.data());
  bytes.ReadTo(back.data());
  EXPECT_TRUE(large == back);
}

}  // namespace
}  // namespace longspan::test
