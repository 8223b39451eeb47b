#include "ops/embedding/embedding.h"

#include <cmath>

#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

constexpr int64_t kV = 11, kD = 133;
const std::vector<int32_t> kIds = {3, 0, 10, 3, 3, 7, 0};

// The order of ids as a training step has it: made on the host, on the device of `ctx`.
ops::EmbeddingOrder OrderOf(Context& ctx, const std::vector<int32_t>& ids, int64_t vocab) {
  Context host(ContextOptions{.threads = 1});
  Tensor t = host.Empty({static_cast<int64_t>(ids.size())}, DType::kI32);
  t.WriteFrom(ids.data());
  ops::EmbeddingOrder order = ops::OrderTokens(host, t, vocab);
  for (Tensor* part : {&order.tokens, &order.pieces, &order.joins}) *part = CopyTo(ctx, *part);
  return order;
}

void CheckLookup(DType table_dtype, DType out, int64_t width, MakeTensor make) {
  Context ctx = OpContext();
  const auto tokens = static_cast<int64_t>(kIds.size());
  const auto columns = static_cast<size_t>(width);
  const Vec table = Normal(kV * width, 1, table_dtype), before = Normal(kV * width, 2);
  const Vec dy = Normal(tokens * width, 3, out);
  const Tensor ids = IntTensor(ctx, kIds);
  const Tensor y = ops::EmbeddingForward(ctx, ids, make(ctx, {kV, width}, table_dtype, table), out);
  Tensor dtable = make(ctx, {kV, width}, AccumulatorOf(out), before);
  ops::EmbeddingBackward(ctx, ids, make(ctx, {tokens, width}, out, dy), dtable,
                         OrderOf(ctx, kIds, kV));
  Vec expected, expected_table = before;
  for (size_t t = 0; t < kIds.size(); ++t) {
    for (size_t d = 0; d < columns; ++d) {
      const size_t at = static_cast<size_t>(kIds[t]) * columns + d;
      expected.push_back(table[at]);
      expected_table[at] += dy[t * columns + d];
    }
  }
  EXPECT_EQ(ToVec(y), RoundedTo(out, expected));
  EXPECT_LE(RelRms(ToVec(dtable), expected_table), 1e-7);
}

TEST(EmbeddingTest, LooksUpAndAddsBack) {
  for (const auto& [table_dtype, out] : {std::pair{DType::kF32, DType::kF32},
                                         {DType::kBF16, DType::kBF16},
                                         {DType::kF32, DType::kBF16},
                                         {DType::kBF16, DType::kF32},
                                         {DType::kF64, DType::kF64}}) {
    if (OnCuda() && out == DType::kF64) continue;
    // 136: whole packs of 16 bytes; 1025: two tasks of 512 columns and a rest.
    for (const int64_t width : {kD, int64_t{136}, int64_t{1025}}) {
      for (const MakeTensor make : kAlignments) CheckLookup(table_dtype, out, width, make);
    }
  }
}

// Ids from never to many hundred times, so that pieces end inside, at and across their limit.
TEST(EmbeddingTest, AddsIdsOfAnyCount) {
  constexpr int64_t kPiece = ops::EmbeddingOrder::kPieceTokens, kWidth = 3;
  std::vector<int32_t> ids;
  const int64_t counts[kV] = {0, 1,   kPiece - 1, kPiece, kPiece + 1, 2 * kPiece, 2 * kPiece + 1,
                              0, 700, 5,          0};
  for (int32_t round = 0; round < 700; ++round) {  // interleaved
    for (int32_t id = 0; id < kV; ++id) {
      if (round < counts[id]) ids.push_back(id);
    }
  }
  Context ctx = OpContext();
  const auto tokens = static_cast<int64_t>(ids.size());
  const Vec dy = Normal(tokens * kWidth, 1), before = Normal(kV * kWidth, 2);
  Tensor dtable = FromVec(ctx, {kV, kWidth}, DType::kF32, before);
  ops::EmbeddingBackward(ctx, IntTensor(ctx, ids), FromVec(ctx, {tokens, kWidth}, DType::kF32, dy),
                         dtable, OrderOf(ctx, ids, kV));
  Vec expected = before;
  for (size_t i = 0; i < dy.size(); ++i) {
    expected[static_cast<size_t>(ids[i / kWidth]) * kWidth + i % kWidth] += dy[i];
  }
  EXPECT_LE(RelRms(ToVec(dtable), expected), 1e-6);
}

TEST(EmbeddingTest, OrderCoversEveryTokenOnce) {
  Context host(ContextOptions{.threads = 1});
  std::vector<int32_t> ids(500);
  for (size_t t = 0; t < ids.size(); ++t) ids[t] = static_cast<int32_t>((7 * t + t / 13) % kV);
  Tensor t = host.Empty({500}, DType::kI32);
  t.WriteFrom(ids.data());
  const ops::EmbeddingOrder order = ops::OrderTokens(host, t, kV);
  std::vector<int> seen(ids.size()), slot_owner(static_cast<size_t>(order.slots), -1);
  const int32_t *tokens = order.tokens.data<int32_t>(), *joins = order.joins.data<int32_t>();
  for (int64_t j = 0; j < order.joins.dim(0); ++j) {
    for (int32_t s = 0; s < joins[3 * j + 2]; ++s) {
      int& owner = slot_owner[static_cast<size_t>(joins[3 * j + 1] + s)];
      EXPECT_EQ(owner, -1);
      owner = joins[3 * j];
    }
  }
  for (int64_t p = 0; p < order.pieces.dim(0); ++p) {
    const int32_t* piece = order.pieces.data<int32_t>() + 3 * p;
    EXPECT_LE(piece[1] - piece[0], ops::EmbeddingOrder::kPieceTokens);
    const int row = piece[2] >= 0 ? piece[2] : slot_owner[static_cast<size_t>(-1 - piece[2])];
    for (int32_t at = piece[0]; at < piece[1]; ++at) {
      EXPECT_EQ(ids[static_cast<size_t>(tokens[at])], row);
      ++seen[static_cast<size_t>(tokens[at])];
      if (at > piece[0]) {
        EXPECT_LT(tokens[at - 1], tokens[at]);
      }
    }
  }
  EXPECT_EQ(seen, std::vector<int>(ids.size(), 1));
  EXPECT_THROW(ops::OrderTokens(host, t, kV - 1), InvalidArgument);
}

TEST(EmbeddingTest, SameBitsForAnyThreads) {
  ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
    std::vector<int32_t> ids(777);
    for (size_t t = 0; t < ids.size(); ++t) ids[t] = static_cast<int32_t>(t * t % kV);
    Tensor dtable = FromVec(ctx, {kV, kD}, DType::kF32, Normal(kV * kD, 2));
    ops::EmbeddingBackward(ctx, IntTensor(ctx, ids),
                           FromVec(ctx, {777, kD}, DType::kBF16, Normal(777 * kD, 3)), dtable,
                           OrderOf(ctx, ids, kV));
    return {dtable, ops::EmbeddingForward(ctx, IntTensor(ctx, ids), dtable, DType::kBF16)};
  });
}

TEST(EmbeddingTest, NoTokens) {
  Context ctx = OpContext();
  const Vec before = Normal(kV * kD, 2);
  Tensor dtable = FromVec(ctx, {kV, kD}, DType::kF32, before);
  const Tensor ids = IntTensor(ctx, {});
  EXPECT_EQ(ops::EmbeddingForward(ctx, ids, dtable, DType::kF32).shape(), Shape({0, kD}));
  ops::EmbeddingBackward(ctx, ids, ctx.Empty({0, kD}, DType::kF32), dtable, OrderOf(ctx, {}, kV));
  EXPECT_EQ(ToVec(dtable), before);
}

// A GPU cannot throw for an id; what it must not do is read or write outside the table.
TEST(EmbeddingTest, IdsOutOfRangeOnAGpuGiveNan) {
  if (!OnCuda()) return;
  for (const int64_t width : {kD, int64_t{136}}) {
    Context ctx = OpContext();
    const Vec table = Normal(kV * width, 2);
    const Vec y =
        ToVec(ops::EmbeddingForward(ctx, IntTensor(ctx, {1, -1, 11, 1 << 30, 10}),
                                    FromVec(ctx, {kV, width}, DType::kF32, table), DType::kF32));
    for (size_t i = 0; i < y.size(); ++i) {
      const size_t t = i / static_cast<size_t>(width);
      EXPECT_EQ(std::isnan(y[i]), t > 0 && t < 4) << i;
    }
  }
}

TEST(EmbeddingTest, AGpuNeedsTheOrderOfTheseIds) {
  if (!OnCuda()) return;
  Context ctx = OpContext();
  const Tensor ids = IntTensor(ctx, {1, 2}), dy = ctx.Zeros({2, kD}, DType::kF32);
  Tensor dtable = ctx.Zeros({kV, kD}, DType::kF32);
  EXPECT_THROW(ops::EmbeddingBackward(ctx, ids, dy, dtable), InvalidArgument);
  EXPECT_THROW(ops::EmbeddingBackward(ctx, ids, dy, dtable, OrderOf(ctx, {1, 2, 3}, kV)),
               InvalidArgument);
  EXPECT_THROW(ops::EmbeddingBackward(ctx, ids, dy, dtable, OrderOf(ctx, {1, 2}, kV + 1)),
               InvalidArgument);
}

TEST(EmbeddingTest, NamesTheIdThatIsOutOfRange) {
  if (OnCuda()) return;
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
