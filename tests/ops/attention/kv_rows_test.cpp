// Rows of keys and values against loops over tokens, at head sizes whose vectors start at 16 bytes
// and at others.
#include "ops/attention/kv_rows.h"

#include <gtest/gtest.h>

#include "ops/core/error.h"
#include "tests/support/device.h"
#include "tests/support/numeric.h"

namespace longspan::test {
namespace {

constexpr int64_t kKvHeads = 3;
constexpr int64_t kTokens = 200, kRows = 700;

Context RowContext() {
  return Context(ContextOptions{.device = TestDevice(), .threads = 2, .poison_buffers = true});
}

struct Piece {
  int64_t token, tokens, head, row;
};
// More than a strip of tokens, fewer, and one.
const std::vector<Piece> kPieces = {
    {0, 130, 1, 300}, {130, 63, 1, 500}, {199, 1, 2, 0}, {5, 64, 0, 100}};

std::vector<ops::RowRun> Runs(const std::vector<Piece>& pieces, bool home) {
  std::vector<ops::RowRun> runs;
  for (const Piece& p : pieces) {
    const int64_t vector = p.token * kKvHeads + p.head;
    runs.push_back(home ? ops::RowRun{2 * p.row, vector, p.tokens}
                        : ops::RowRun{vector, 2 * p.row, p.tokens});
  }
  return runs;
}

class KvRowsTest : public ::testing::TestWithParam<std::pair<DType, int64_t>> {
 protected:
  DType dtype() const { return GetParam().first; }
  int64_t dim() const { return GetParam().second; }
  // Sums are in f32, and in f64 on a CPU.
  bool Adds() const { return dtype() == DType::kF32 || (dtype() == DType::kF64 && !OnCuda()); }
  size_t At(int64_t vector) const { return static_cast<size_t>(vector * dim()); }
  Vec Values(int64_t vectors, uint64_t seed) const {
    return Normal(vectors * dim(), seed, dtype());
  }
  // to[to_vector] = (or +=) from[from_vector]
  void Take(const Vec& from, int64_t from_vector, Vec& to, int64_t to_vector, bool add) const {
    for (size_t d = 0; d < static_cast<size_t>(dim()); ++d) {
      double& value = to[At(to_vector) + d];
      value = (add ? value : 0) + from[At(from_vector) + d];
      if (add && dtype() == DType::kF32) value = static_cast<float>(value);
    }
  }
};

TEST_P(KvRowsTest, PackPutsKeysAndValuesSideBySide) {
  Context ctx = RowContext();
  const Vec k = Values(kTokens * kKvHeads, 1), v = Values(kTokens * kKvHeads, 2);
  Vec expected = Values(2 * kRows, 3);
  Tensor rows = FromVec(ctx, {kRows, 2, dim()}, dtype(), expected);
  for (const Piece& p : kPieces) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t from = (p.token + t) * kKvHeads + p.head;
      Take(k, from, expected, 2 * (p.row + t), false);
      Take(v, from, expected, 2 * (p.row + t) + 1, false);
    }
  }
  const ops::RowTable table(Runs(kPieces, false), kKvHeads, 2);
  ops::PackKv(ctx, table, FromVec(ctx, {kTokens, kKvHeads, dim()}, dtype(), k),
              FromVec(ctx, {kTokens, kKvHeads, dim()}, dtype(), v), rows);
  EXPECT_EQ(ToVec(rows), expected);
}

TEST_P(KvRowsTest, CopyMovesWholeRows) {
  Context ctx = RowContext();
  const Vec from = Values(2 * kRows, 1);
  Vec expected = Values(2 * kRows, 2);
  Tensor to = FromVec(ctx, {kRows, 2, dim()}, dtype(), expected);
  const std::vector<ops::RowRun> runs = {{2 * 10, 2 * 400, 200}, {2 * 10, 2 * 7, 65}};
  for (const ops::RowRun& run : runs) {
    for (int64_t i = 0; i < 2 * run.tokens; ++i)
      Take(from, run.from + i, expected, run.to + i, false);
  }
  ops::CopyRows(ctx, ops::RowTable(runs, 2, 2), FromVec(ctx, {kRows, 2, dim()}, dtype(), from), to);
  EXPECT_EQ(ToVec(to), expected);
}

// The order of the list decides the last bits.
TEST_P(KvRowsTest, SumsTakeSourcesInTheirOrder) {
  if (!Adds()) return;
  Context ctx = RowContext();
  Vec expected = Values(2 * kRows, 2);
  Tensor rows = FromVec(ctx, {kRows, 2, dim()}, dtype(), expected);
  const std::vector<ops::RowRun> runs = {
      {2 * 500, 2 * 100, 70}, {2 * 300, 2 * 0, 10}, {2 * 200, 2 * 100, 70}, {2 * 600, 2 * 100, 70}};
  for (const ops::RowRun& run : runs) {
    for (int64_t i = 0; i < 2 * run.tokens; ++i) {
      Take(expected, run.from + i, expected, run.to + i, true);
    }
  }
  ops::AddRows(ctx, ops::RowTable(runs, 2, 2), rows, rows);  // reads rows >= 200, writes below
  EXPECT_EQ(ToVec(rows), expected);
}

TEST_P(KvRowsTest, SumsGoHome) {
  if (!Adds()) return;
  Context ctx = RowContext();
  const Vec rows = Values(2 * kRows, 1);
  Vec dk = Values(kTokens * kKvHeads, 2), dv = Values(kTokens * kKvHeads, 3);
  Tensor tk = FromVec(ctx, {kTokens, kKvHeads, dim()}, dtype(), dk);
  Tensor tv = FromVec(ctx, {kTokens, kKvHeads, dim()}, dtype(), dv);
  std::vector<Piece> pieces = kPieces;
  pieces.push_back({0, 130, 1, 10});  // a second share of the first piece
  for (const Piece& p : pieces) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t to = (p.token + t) * kKvHeads + p.head;
      Take(rows, 2 * (p.row + t), dk, to, true);
      Take(rows, 2 * (p.row + t) + 1, dv, to, true);
    }
  }
  ops::AddToKv(ctx, ops::RowTable(Runs(pieces, true), 2, kKvHeads),
               FromVec(ctx, {kRows, 2, dim()}, dtype(), rows), tk, tv);
  EXPECT_EQ(ToVec(tk), dk);
  EXPECT_EQ(ToVec(tv), dv);
}

TEST_P(KvRowsTest, SlicesOfHeadsGoBackWhereTheyCameFrom) {
  Context ctx = RowContext();
  for (const int64_t rank : {2, 3}) {
    const int64_t width = rank == 3 ? dim() : 1, heads = 5;
    const auto shape = [&](int64_t h) {
      return rank == 3 ? Shape{kTokens, h, width} : Shape{kTokens, h};
    };
    const Vec all = Normal(kTokens * heads * width, 1, dtype());
    Vec expected = Normal(kTokens * heads * width, 2, dtype());
    Tensor to = FromVec(ctx, shape(heads), dtype(), expected);
    Vec slice;
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t i = 2 * width; i < 4 * width; ++i) {
        slice.push_back(all[static_cast<size_t>(t * heads * width + i)]);
        expected[static_cast<size_t>(t * heads * width + i - width)] = slice.back();
      }
    }
    const Tensor got = ops::SliceHeads(ctx, FromVec(ctx, shape(heads), dtype(), all), 2, 4);
    EXPECT_EQ(got.shape(), shape(2));
    EXPECT_EQ(ToVec(got), slice);
    ops::PlaceHeads(ctx, got, 1, to);
    EXPECT_EQ(ToVec(to), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, KvRowsTest,
                         ::testing::Values(std::pair{DType::kF32, 8}, std::pair{DType::kF32, 5},
                                           std::pair{DType::kBF16, 16}, std::pair{DType::kBF16, 3},
                                           std::pair{DType::kF64, 8}));

TEST(KvRowsErrorTest, WhatDoesNotFitIsRefusedBeforeAnythingIsWritten) {
  Context ctx = RowContext();
  const Tensor k = ctx.Zeros({4, 2, 8}, DType::kF32);
  Tensor rows = ctx.Zeros({6, 2, 8}, DType::kF32), bf16 = ctx.Zeros({6, 2, 8}, DType::kBF16);
  const auto table = [](int64_t from, int64_t to, int64_t tokens, int64_t stride) {
    return ops::RowTable({{from, to, tokens}}, stride, 2);
  };
  EXPECT_NO_THROW(ops::PackKv(ctx, table(1, 4, 4, 2), k, k, rows));
  EXPECT_THROW(ops::PackKv(ctx, table(3, 4, 4, 2), k, k, rows), InvalidArgument);   // past k
  EXPECT_THROW(ops::PackKv(ctx, table(1, 6, 4, 2), k, k, rows), InvalidArgument);   // past rows
  EXPECT_THROW(ops::PackKv(ctx, table(1, 4, 4, 3), k, k, rows), InvalidArgument);   // heads
  EXPECT_THROW(ops::PackKv(ctx, table(1, 4, 4, 2), k, k, bf16), InvalidArgument);   // dtypes
  EXPECT_THROW(ops::AddRows(ctx, table(0, 6, 2, 2), bf16, bf16), InvalidArgument);  // sums in bf16
  EXPECT_THROW(ops::CopyRows(ctx, table(8, 0, 3, 2), rows, rows), InvalidArgument);
  const ops::RowTable twice({{0, 8, 2}, {4, 8, 2}}, 2, 2);
  EXPECT_THROW(ops::CopyRows(ctx, twice, rows, rows), InvalidArgument);
  EXPECT_THROW(ops::RowTable({{0, 8, 2}, {4, 8, 1}}, 2, 2), InvalidArgument);
  EXPECT_THROW(ops::SliceHeads(ctx, k, 1, 3), InvalidArgument);
  Tensor place = ctx.Zeros({4, 1, 8}, DType::kF32);
  EXPECT_THROW(ops::PlaceHeads(ctx, k, 0, place), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
