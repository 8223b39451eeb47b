// What a call of attention costs besides its kernels, by the counters of the emulated device: masks
// and tables are uploaded once, and the host never waits.
#include <gtest/gtest.h>

#include "tests/emulated_cuda/emulator.h"
#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kTokens = 300, kHeads = 4, kKvHeads = 2, kDim = 16;

// Forward and backward of one layer as a model with these options calls them.
struct Layer {
  Context& ctx;
  const ops::BlockMask& mask;
  Tensor q = ctx.Zeros({kTokens, kHeads, kDim}, DType::kF32);
  Tensor k = ctx.Zeros({kTokens, kKvHeads, kDim}, DType::kF32);
  Tensor dq = ctx.Zeros(q.shape(), DType::kF32), dkv = ctx.Zeros(k.shape(), DType::kF32);

  void Run() {
    const auto kv = ops::MakeKvView(k, k, mask);
    const auto forward = ops::AttentionForward(ctx, q, kv, mask);
    const Tensor delta = ops::AttentionDelta(ctx, q, forward.o);
    ops::AttentionBackward(ctx, q, q, kv, forward.lse, delta, mask, dq,
                           ops::MakeKvGradView(dkv, dkv, mask));
  }
};

emulated::Counters Spent(const std::function<void()>& run) {
  const emulated::Counters before = emulated::Count();
  run();
  emulated::Counters spent = emulated::Count();
  spent.launches -= before.launches;
  spent.allocations -= before.allocations;
  spent.copies -= before.copies;
  spent.host_waits -= before.host_waits;
  spent.blocking_copies -= before.blocking_copies;
  return spent;
}

TEST(AttentionUploadsTest, OneUploadForAllLayersAndPasses) {
  Context ctx = OpContext();
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(kTokens, {{130, kTokens}}));
  const auto all = ops::BlockList::All(*documents);
  const auto build = [&](const ops::AttentionPattern& pattern) {
    return ops::BlockMask::Build(pattern, kKvHeads, documents, all, all);
  };
  const auto causal = build(ops::AttentionPattern::Causal());
  const auto window = build(ops::AttentionPattern::Window(40));
  Layer first{ctx, *causal}, second{ctx, *causal}, third{ctx, *window};
  // The mask, its documents, and one table for k, v, dk and dv.
  const emulated::Counters cold = Spent([&] { first.Run(); });
  EXPECT_EQ(cold.copies, 3u);
  EXPECT_EQ(cold.host_waits + cold.blocking_copies, 0u);
  const emulated::Counters warm = Spent([&] { second.Run(); });
  EXPECT_EQ(warm.copies, 0u);
  if (kAllocatorReuses) {
    EXPECT_EQ(warm.allocations, 0u);
  }
  EXPECT_EQ(warm.launches, 4u);  // forward, delta, dQ, dK and dV
  EXPECT_EQ(warm.host_waits + warm.blocking_copies, 0u);
  // The same documents.
  EXPECT_EQ(Spent([&] { third.Run(); }).copies, 2u);
}

}  // namespace
}  // namespace longspan::test
