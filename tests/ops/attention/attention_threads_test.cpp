// The number of threads changes no bit of any result, and the progress hook runs between tasks.
#include <gtest/gtest.h>

#include "tests/ops/attention/attention_fixture.h"

namespace longspan::test {
namespace {

Context WithThreads(int threads) {
  ContextOptions options;
  options.threads = threads;
  return Context(options);
}

AttentionCase SmallCase(DType dtype) {
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(300, {{150, 300}}));
  const auto all = ops::BlockList::All(*documents);
  return {.mask_case = {.pattern = {"causal", ops::AttentionPattern::Causal()},
                        .documents = {"two", documents},
                        .shard = {"whole", all, all},
                        .kv_heads = 3},
          .dtype = dtype,
          .group = 2,
          .dim = 24,
          .scale = 0,
          .with_dlse = true,
          .seed = 9};
}

TEST(AttentionThreadsTest, SameBitsForAnyNumberOfThreads) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
    const AttentionCase c = SmallCase(dtype);
    const AttentionInputs in = MakeInputs(c);
    Context one = WithThreads(1);
    for (const std::string& name :
         ImplementationsFor(one, {dtype, c.heads(), c.mask_case.kv_heads, c.dim})) {
      const AttentionRun want = RunAttention(one, c, in, name);
      for (const int threads : {2, 5}) {
        Context many = WithThreads(threads);
        const AttentionRun run = RunAttention(many, c, in, name);
        EXPECT_EQ(run.o, want.o) << name << " " << threads;
        EXPECT_EQ(run.lse, want.lse) << name << " " << threads;
        EXPECT_EQ(run.dq, want.dq) << name << " " << threads;
        EXPECT_EQ(run.dk, want.dk) << name << " " << threads;
        EXPECT_EQ(run.dv, want.dv) << name << " " << threads;
      }
    }
  }
}

TEST(AttentionThreadsTest, ProgressRunsBetweenTasks) {
  Context ctx = WithThreads(1);
  int calls = 0;
  ctx.SetProgress([&] { ++calls; });
  const AttentionCase c = SmallCase(DType::kF32);
  RunAttention(ctx, c, MakeInputs(c), "");
  // 5 blocks x 3 kv heads: one task each in forward, in dK/dV and in dQ.
  EXPECT_GE(calls, 3 * 5 * 3);
}

}  // namespace
}  // namespace longspan::test
