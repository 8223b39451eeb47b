// The number of threads changes no bit of any result, and the progress hook runs between tasks.
#include <gtest/gtest.h>

#include <thread>

#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

Context WithThreads(int threads) { return Context({.threads = threads}); }

AttentionCase SmallCase(DType dtype,
                        ops::Normalization normalization = ops::Normalization::kSoftmax) {
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
          .seed = 9,
          .normalization = normalization};
}

TEST(AttentionThreadsTest, SameBitsForAnyNumberOfThreads) {
  if (OnCuda()) return;  // kernels have no threads of the host
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
    for (const ops::Normalization normalization : kNormalizations) {
      const AttentionCase c = SmallCase(dtype, normalization);
      const AttentionInputs in = MakeInputs(c);
      Context one = WithThreads(1);
      for (const std::string& name : ImplementationsFor(one, c)) {
        const AttentionRun want = RunAttention(one, c, in, name);
        for (const int threads : {1, 2, 3, 5}) {
          SCOPED_TRACE(Str(name, " ", c.Name(), " ", threads));
          Context many = WithThreads(threads);
          const AttentionRun run = RunAttention(many, c, in, name);
          EXPECT_EQ(run.o, want.o);
          EXPECT_EQ(run.lse, want.lse);
          EXPECT_EQ(run.dq, want.dq);
          EXPECT_EQ(run.dk, want.dk);
          EXPECT_EQ(run.dv, want.dv);
        }
      }
    }
  }
}

TEST(AttentionThreadsTest, ProgressRunsBetweenTasks) {
  if (OnCuda()) return;
  Context ctx = WithThreads(1);
  int calls = 0;
  ctx.SetProgress([&] { ++calls; });
  const AttentionCase c = SmallCase(DType::kF32);
  RunAttention(ctx, c, MakeInputs(c), "");
  // 5 blocks x 3 kv heads: one task each in forward, in dK/dV and in dQ.
  EXPECT_GE(calls, 3 * 5 * 3);
}

// Ranks that are threads of one process compute with one mask object, each in its own Context.
TEST(AttentionThreadsTest, RanksShareAMask) {
  const AttentionCase c = SmallCase(DType::kF32);
  const AttentionInputs in = MakeInputs(c);
  AttentionRun want;
  {
    Context ctx = OpContext(1);
    want = RunAttention(ctx, c, in, "");
  }
  const auto mask = BuildMask(c.mask_case);
  constexpr size_t kRanks = 4;
  std::vector<AttentionRun> runs(kRanks);
  std::vector<std::thread> ranks;
  for (AttentionRun& run : runs) {
    ranks.emplace_back([&] {
      Context ctx = OpContext(1);
      for (int repeat = 0; repeat < 2; ++repeat) run = RunAttention(ctx, c, in, "", mask);
    });
  }
  for (std::thread& rank : ranks) rank.join();
  for (const AttentionRun& run : runs) {
    EXPECT_EQ(run.o, want.o);
    EXPECT_EQ(run.lse, want.lse);
    EXPECT_EQ(run.dq, want.dq);
    EXPECT_EQ(run.dk, want.dk);
    EXPECT_EQ(run.dv, want.dv);
  }
}

}  // namespace
}  // namespace longspan::test
