// What the tests of attention, which this executable also holds, cannot see of AMX: that tiles are
// used at all, and that every task gives them back. That tiles are configured, shaped and written
// as they are used is checked by the emulation with every instruction.
#include <gtest/gtest.h>

#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/attention/emulated_amx.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

TEST(EmulatedAmxTest, IsTheFirstChoiceAndReleasesItsTiles) {
  const auto documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(300, {{150, 300}}));
  const auto all = ops::BlockList::All(*documents);
  AttentionCase c{.mask_case = {.pattern = {"causal", ops::AttentionPattern::Causal()},
                                .documents = {"two", documents},
                                .shard = {"whole", all, all},
                                .kv_heads = 2},
                  .dtype = DType::kBF16,
                  .group = 2,
                  .dim = 64};
  const AttentionInputs in = MakeInputs(c);
  for (const auto& [threads, normalization] : {std::pair{1, ops::Normalization::kSoftmax},
                                               {3, ops::Normalization::kSoftmax},
                                               {1, ops::Normalization::kSigmoid},
                                               {3, ops::Normalization::kSigmoid}}) {
    c.normalization = normalization;
    Context ctx = OpContext(threads);
    const emulated_amx::Counts before = emulated_amx::CountsSoFar();
    const AttentionRun run = RunAttention(ctx, c, in, "");
    const emulated_amx::Counts after = emulated_amx::CountsSoFar();
    EXPECT_EQ(run.implementation, "amx_bf16");
    EXPECT_EQ(after.configured, 0) << "a task kept its tiles";
    // 5 blocks x 2 kv heads: one task each in forward, by columns and by rows, configured once.
    EXPECT_EQ(after.loads - before.loads, 3 * 5 * 2);
    // 11 blocks are visible of each head; 7 products of 64 x 64 x 64 (2 forward, 5 backward) make
    // 4 x 4 x 2 tile products each. Blocks of 44 keys or queries need fewer.
    const int64_t whole = 11 * 4 * 7 * 32;
    EXPECT_LE(after.products - before.products, whole);
    EXPECT_GT(after.products - before.products, whole / 2);
  }
}

}  // namespace
}  // namespace longspan::test
