#include "ops/embedding/embedding.h"

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kV = 11, kD = 133;  // D: two tasks of 64 columns and a rest
const std::vector<int32_t> kIds = {3, 0, 10, 3, 3, 7, 0};

TEST(EmbeddingTest, LooksUpAndAddsBack) {
  for (const auto& [table_dtype, out] : {std::pair{DType::kF32, DType::kF32},
                                         {DType::kBF16, DType::kBF16},
                                         {DType::kF32, DType::kBF16},
                                         {DType::kBF16, DType::kF32},
                                         {DType::kF64, DType::kF64}}) {
    Context ctx = OpContext();
    const Vec table = Normal(kV * kD, 1, table_dtype), before = Normal(kV * kD, 2);
    const Vec dy = Normal(static_cast<int64_t>(kIds.size()) * kD, 3, out);
    const Tensor ids = IntTensor(ctx, kIds);
    const Tensor y =
        ops::EmbeddingForward(ctx, ids, FromVec(ctx, {kV, kD}, table_dtype, table), out);
    Tensor dtable = FromVec(ctx, {kV, kD}, AccumulatorOf(out), before);
    ops::EmbeddingBackward(ctx, ids, FromVec(ctx, {static_cast<int64_t>(kIds.size()), kD}, out, dy),
                           dtable);
    Vec expected, expected_table = before;
    for (size_t t = 0; t < kIds.size(); ++t) {
      for (size_t d = 0; d < kD; ++d) {
        const size_t at = static_cast<size_t>(kIds[t]) * kD + d;
        expected.push_back(table[at]);
        expected_table[at] += dy[t * kD + d];
      }
    }
    EXPECT_EQ(ToVec(y), RoundedTo(out, expected));
    EXPECT_LE(RelRms(ToVec(dtable), expected_table), 1e-7);
  }
}

TEST(EmbeddingTest, SameBitsForAnyThreads) {
  ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
    std::vector<int32_t> ids(777);
    for (size_t t = 0; t < ids.size(); ++t) ids[t] = static_cast<int32_t>(t * t % kV);
    Tensor dtable = FromVec(ctx, {kV, kD}, DType::kF32, Normal(kV * kD, 2));
    ops::EmbeddingBackward(ctx, IntTensor(ctx, ids),
                           FromVec(ctx, {777, kD}, DType::kBF16, Normal(777 * kD, 3)), dtable);
    return {dtable, ops::EmbeddingForward(ctx, IntTensor(ctx, ids), dtable, DType::kBF16)};
  });
}

TEST(EmbeddingTest, NoTokens) {
  Context ctx = OpContext();
  const Vec before = Normal(kV * kD, 2);
  Tensor dtable = FromVec(ctx, {kV, kD}, DType::kF32, before);
  const Tensor ids = IntTensor(ctx, {});
  EXPECT_EQ(ops::EmbeddingForward(ctx, ids, dtable, DType::kF32).shape(), Shape({0, kD}));
  ops::EmbeddingBackward(ctx, ids, ctx.Empty({0, kD}, DType::kF32), dtable);
  EXPECT_EQ(ToVec(dtable), before);
}

TEST(EmbeddingTest, NamesTheIdThatIsOutOfRange) {
  Context ctx = OpContext();
  const Vec before = Normal(kV * kD, 2);
  Tensor table = FromVec(ctx, {kV, kD}, DType::kF32, before);
  for (const int32_t bad : {-1, 11}) {
    const Tensor ids = IntTensor(ctx, {0, 10, bad});
    try {
      ops::EmbeddingForward(ctx, ids, table, DType::kF32);
      ADD_FAILURE() << "id " << bad << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(Str("id ", bad)), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find("11"), std::string::npos) << e.what();
    }
    EXPECT_THROW(ops::EmbeddingBackward(ctx, ids, ctx.Zeros({3, kD}, DType::kF32), table),
                 InvalidArgument);
    EXPECT_EQ(ToVec(table), before);
  }
  EXPECT_THROW(ops::EmbeddingForward(ctx, IntTensor(ctx, {0}), table, DType::kF64),
               InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
