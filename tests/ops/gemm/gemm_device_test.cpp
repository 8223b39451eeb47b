// What the products of a GPU do when cuBLASLt or the memory refuses, seen by the emulated device.
#include "ops/gemm/gemm.h"
#include "tests/emulated_cuda/emulator.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

class GemmDeviceTest : public testing::Test {
 protected:
  void TearDown() override { emulated::Recover(); }
  static Context Gpu() { return Context({.device = {DeviceKind::kCuda, 0}, .threads = 1}); }
  static Tensor Product(Context& ctx) {
    const Tensor a = FromVec(ctx, {2, 3}, DType::kF32, {1, 2, 3, 4, 5, 6});
    Tensor c = ctx.Zeros({2, 2}, DType::kF32);
    ops::Gemm(ctx, a, false, a, true, c);
    return c;
  }
  static constexpr double kProduct[] = {14, 32, 32, 77};
};

// An algorithm may be named and yet be marked as unusable.
TEST_F(GemmDeviceTest, AnAlgorithmThatCannotBeUsedCountsAsNone) {
  Context ctx = Gpu();
  emulated::FailNext(emulated::Fault::kGemmChoice);
  EXPECT_THROW(Product(ctx), Unsupported);
  EXPECT_EQ(ToVec(Product(ctx)), Vec(std::begin(kProduct), std::end(kProduct)));
}

TEST_F(GemmDeviceTest, TheWorkspaceIsCountedAndItsLackExplained) {
  constexpr size_t kWorkspace = size_t{32} << 20;
  Context ctx = Gpu();
  const Tensor first = Product(ctx);
  EXPECT_GE(ctx.allocator().used_bytes(), kWorkspace);
  EXPECT_EQ(ctx.allocator().peak_by_category()[static_cast<size_t>(MemoryCategory::kWorkspace)],
            kWorkspace);
  Context poor = Gpu();
  Tensor large = poor.Empty({int64_t{24} << 20}, DType::kU8);
  size_t free_bytes = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_bytes, &total), cudaSuccess);
  emulated::SetMemoryLimit(total - free_bytes + kWorkspace / 2);
  try {
    Product(poor);
    ADD_FAILURE() << "there was room for a workspace";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("out of GPU memory"), std::string::npos) << e.what();
  }
  large = Tensor();  // the allocator keeps it, and gives it up for the workspace
  EXPECT_EQ(ToVec(Product(poor)), Vec(std::begin(kProduct), std::end(kProduct)));
  emulated::SetMemoryLimit(total);
}

}  // namespace
}  // namespace longspan::test
