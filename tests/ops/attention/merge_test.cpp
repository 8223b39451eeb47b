// Partial results over a random split of the key blocks equal the unsplit ones, forward and (of
// softmax with the final lse and delta) backward.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "ops/core/rng.h"
#include "tests/ops/attention/attention_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using ops::AttentionForward;
using ops::AttentionOptions;
using ops::BlockList;
using ops::BlockMask;

constexpr int64_t kTokens = 500, kKvHeads = 2, kHeads = 4, kDim = 16;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Split {
  std::shared_ptr<const ops::Documents> documents;
  BlockList all;
  std::vector<BlockList> parts;
};

Split RandomSplit(uint64_t seed) {
  Split split;
  split.documents =
      std::make_shared<ops::Documents>(ops::Documents::FromEnds(kTokens, {{130, 300, kTokens}}));
  split.all = BlockList::All(*split.documents);
  std::vector<std::vector<int32_t>> ids(3);
  const Philox rng(seed, StreamOf("split"));
  for (const int32_t id : split.all.ids) ids[rng.Below(static_cast<uint64_t>(id), 3)].push_back(id);
  for (auto& part : ids) split.parts.push_back(BlockList::FromIds(*split.documents, part));
  return split;
}

// The rows of [tokens, ...] values that belong to the blocks of a part, and back.
Vec TakeRows(const Vec& from, const BlockList& all, const BlockList& part, int64_t width) {
  Vec rows;
  for (const int32_t id : part.ids) {
    const auto begin = from.begin() + all.token_begin[static_cast<size_t>(id)] * width;
    const auto end = from.begin() + all.token_begin[static_cast<size_t>(id) + 1] * width;
    rows.insert(rows.end(), begin, end);
  }
  return rows;
}

Vec Sum(Vec a, const Vec& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

void Check(DType dtype, ops::Normalization normalization, const std::string& implementation,
           double tolerance, uint64_t seed) {
  const bool sigmoid = normalization == ops::Normalization::kSigmoid;
  SCOPED_TRACE(
      Str(implementation, " ", ToString(dtype), sigmoid ? " sigmoid" : "", " seed ", seed));
  Context ctx = OpContext(1);
  const Split split = RandomSplit(seed);
  const auto pattern = ops::AttentionPattern::S2(
      {.block_size = 32, .local_blocks = 2, .stride_blocks = 2, .head_offset = 1});
  const AttentionOptions options{.implementation = implementation, .normalization = normalization};
  const DType wide = AccumulatorOf(dtype);
  const int64_t width = kKvHeads * kDim;
  const Vec k = Normal(kTokens * width, seed, dtype), v = Normal(kTokens * width, seed + 1, dtype);
  const Tensor q = FromVec(ctx, {kTokens, kHeads, kDim}, dtype,
                           Normal(kTokens * kHeads * kDim, seed + 2, dtype));
  const Tensor d_out = FromVec(ctx, q.shape(), dtype, Normal(q.numel(), seed + 3, dtype));

  // The whole key set, then its parts, all through this.
  struct Piece {
    std::shared_ptr<const BlockMask> mask;
    ops::KvView kv;
    Tensor dk, dv;
    ops::KvGradView dkv;
  };
  const auto piece_of = [&](const BlockList& keys) {
    Piece piece;
    const Shape shape{keys.tokens(), kKvHeads, kDim};
    piece.mask = BlockMask::Build(pattern, kKvHeads, split.documents, split.all, keys);
    piece.kv = ops::MakeKvView(FromVec(ctx, shape, dtype, TakeRows(k, split.all, keys, width)),
                               FromVec(ctx, shape, dtype, TakeRows(v, split.all, keys, width)),
                               *piece.mask);
    piece.dk = ctx.Zeros(shape, wide);
    piece.dv = ctx.Zeros(shape, wide);
    piece.dkv = ops::MakeKvGradView(piece.dk, piece.dv, *piece.mask);
    return piece;
  };
  const Piece whole = piece_of(split.all);
  const ops::AttentionResult want = AttentionForward(ctx, q, whole.kv, *whole.mask, options);
  const Tensor delta = sigmoid ? Tensor() : ops::AttentionDelta(ctx, d_out, want.o);
  Tensor want_dq = ctx.Zeros(q.shape(), wide);
  ops::AttentionBackward(ctx, d_out, q, whole.kv, want.lse, delta, *whole.mask, want_dq, whole.dkv,
                         options);

  Tensor o, lse, dq = ctx.Zeros(q.shape(), wide);
  std::vector<Piece> pieces;
  for (const BlockList& part : split.parts) {
    pieces.push_back(piece_of(part));
    const auto partial = AttentionForward(ctx, q, pieces.back().kv, *pieces.back().mask, options);
    if (!o.defined()) {
      o = partial.o;
      lse = partial.lse;
    } else if (sigmoid) {
      o = FromVec(ctx, o.shape(), wide, Sum(ToVec(o), ToVec(partial.o)));
    } else {
      ops::MergePartial(ctx, o, lse, partial.o, partial.lse);
    }
  }
  EXPECT_LT(RelMax(ToVec(o), ToVec(want.o)), tolerance);
  if (!sigmoid) {
    EXPECT_LT(RelMax(ToVec(lse), ToVec(want.lse)), tolerance);
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    ops::AttentionBackward(ctx, d_out, q, pieces[i].kv, lse, delta, *pieces[i].mask, dq,
                           pieces[i].dkv, options);
    const Vec want_dk = TakeRows(ToVec(whole.dk), split.all, split.parts[i], width);
    const Vec want_dv = TakeRows(ToVec(whole.dv), split.all, split.parts[i], width);
    EXPECT_LT(RelMax(ToVec(pieces[i].dk), want_dk), tolerance);
    EXPECT_LT(RelMax(ToVec(pieces[i].dv), want_dv), tolerance);
  }
  EXPECT_LT(RelMax(ToVec(dq), ToVec(want_dq)), tolerance);
}

TEST(MergeTest, PartsOfTheKeysGiveTheWhole) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    for (const DType dtype : FloatDtypes()) {
      for (const std::string& name :
           ImplementationsFor(OpContext(1), {dtype, kHeads, kKvHeads, kDim})) {
        // Entries on bf16 operands round probabilities, relative to other maxima in a part.
        const bool rounds = name.ends_with("_bf16");
        Check(dtype, ops::Normalization::kSoftmax, name,
              rounds                 ? 5e-3
              : dtype == DType::kF64 ? 1e-13
                                     : 1e-5,
              seed);
      }
    }
  }
}

TEST(MergeTest, SigmoidPartsAdd) {
  for (const DType dtype : FloatDtypes()) {
    const std::vector<std::string> names = ImplementationsFor(
        OpContext(1), {.dtype = dtype, .heads = kHeads, .kv_heads = kKvHeads, .head_dim = kDim});
    ASSERT_FALSE(names.empty());
    for (const std::string& name : names) {
      // The same weights, rounded alike, in every part: only sums differ.
      for (uint64_t seed = 1; seed <= 2; ++seed) {
        Check(dtype, ops::Normalization::kSigmoid, name, dtype == DType::kF64 ? 1e-13 : 1e-5, seed);
      }
    }
  }
}

TEST(MergeTest, EmptyPartsAreNeutral) {
  Context ctx = OpContext();
  const Shape shape{3, 1, 2};
  // Row 0: only the first part sees keys; row 1: only the second; row 2: neither.
  Tensor o = FromVec(ctx, shape, DType::kF32, {1, 2, 7, 8, 7, 8});
  Tensor lse = FromVec(ctx, {3, 1}, DType::kF32, {0.5, -kInfinity, -kInfinity});
  const Tensor o2 = FromVec(ctx, shape, DType::kF32, {9, 9, 3, 4, 9, 9});
  const Tensor lse2 = FromVec(ctx, {3, 1}, DType::kF32, {-kInfinity, -0.5, -kInfinity});
  ops::MergePartial(ctx, o, lse, o2, lse2);
  EXPECT_EQ(ToVec(o), (Vec{1, 2, 3, 4, 0, 0}));
  EXPECT_EQ(ToVec(lse), (Vec{0.5, -0.5, -kInfinity}));
}

TEST(MergeTest, WeighsByTheSumsBehindLse) {
  Context ctx = OpContext();
  const DType dtype = OnCuda() ? DType::kF32 : DType::kF64;
  const double tolerance = OnCuda() ? 5e-7 : 1e-15;
  Tensor o = FromVec(ctx, {1, 1, 1}, dtype, {1});
  Tensor lse = FromVec(ctx, {1, 1}, dtype, {std::log(3.0)});
  ops::MergePartial(ctx, o, lse, FromVec(ctx, {1, 1, 1}, dtype, {5}),
                    FromVec(ctx, {1, 1}, dtype, {std::log(1.0)}));
  EXPECT_NEAR(ToVec(o)[0], (3 * 1 + 1 * 5) / 4.0, tolerance);
  EXPECT_NEAR(ToVec(lse)[0], std::log(4.0), tolerance);
}

// Rows of any length, at 16 bytes or not, more of them than a block of threads takes.
constexpr int64_t kWidths[] = {1, 7, 8, 12, 33, 64, 72, 256, 300};

TEST(MergeTest, AnyWidthAndAlignment) {
  Context ctx = OpContext();
  const int64_t tokens = 41, heads = 3;
  for (const int64_t dim : kWidths) {
    for (const MakeTensor make : kAlignments) {
      const Vec a = Normal(tokens * heads * dim, 1), b = Normal(tokens * heads * dim, 2);
      Vec lse_a = Normal(tokens * heads, 3), lse_b = Normal(tokens * heads, 4);
      lse_a[0] = lse_b[1] = lse_a[2] = lse_b[2] = -kInfinity;
      Vec want(a.size()), want_lse(lse_a.size());
      for (size_t i = 0; i < lse_a.size(); ++i) {
        const double x = std::exp(lse_a[i]), y = std::exp(lse_b[i]);
        want_lse[i] = std::log(x + y);
        for (size_t d = i * static_cast<size_t>(dim); d < (i + 1) * static_cast<size_t>(dim); ++d) {
          want[d] = x + y == 0 ? 0 : (x * a[d] + y * b[d]) / (x + y);
        }
      }
      Tensor o = make(ctx, {tokens, heads, dim}, DType::kF32, a);
      Tensor lse = FromVec(ctx, {tokens, heads}, DType::kF32, lse_a);
      ops::MergePartial(ctx, o, lse, make(ctx, o.shape(), DType::kF32, b),
                        FromVec(ctx, lse.shape(), DType::kF32, lse_b));
      EXPECT_LT(RelMax(ToVec(o), want), 1e-6) << dim;
      Vec got_lse = ToVec(lse);
      EXPECT_EQ(got_lse[2], -kInfinity);
      got_lse[2] = want_lse[2] = 0;
      EXPECT_LT(RelMax(got_lse, want_lse), 1e-6) << dim;
    }
  }
}

// A NaN anywhere reaches o, and one of an lse reaches lse, also beside a part that saw no key.
TEST(MergeTest, NanInAnyPositionStaysVisible) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  Context ctx = OpContext();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    if (OnCuda() && dtype == DType::kF64) continue;
    const auto merge = [&](double o, double lse, double o2, double lse2) {
      Tensor to = FromVec(ctx, {1, 1, 1}, dtype, {o}), to_lse = FromVec(ctx, {1, 1}, dtype, {lse});
      ops::MergePartial(ctx, to, to_lse, FromVec(ctx, {1, 1, 1}, dtype, {o2}),
                        FromVec(ctx, {1, 1}, dtype, {lse2}));
      return std::pair{ToVec(to)[0], ToVec(to_lse)[0]};
    };
    for (const double other : {-kInfinity, 0.5, kNan}) {
      for (const auto& [o, lse] : {merge(1, kNan, 2, other), merge(1, other, 2, kNan)}) {
        EXPECT_TRUE(std::isnan(o)) << "beside lse " << other;
        EXPECT_TRUE(std::isnan(lse)) << "beside lse " << other;
      }
    }
    for (const double other : {-kInfinity, 0.5}) {
      EXPECT_TRUE(std::isnan(merge(kNan, 0.25, 2, other).first)) << "beside lse " << other;
      EXPECT_TRUE(std::isnan(merge(1, other, kNan, 0.25).first)) << "beside lse " << other;
    }
  }
}

TEST(MergeTest, RejectsWhatDoesNotFit) {
  Context ctx = OpContext();
  Tensor o = ctx.Zeros({2, 1, 4}, DType::kF32), lse = ctx.Zeros({2, 1}, DType::kF32);
  EXPECT_THROW(ops::MergePartial(ctx, o, lse, ctx.Zeros({2, 1, 5}, DType::kF32), lse),
               InvalidArgument);
  EXPECT_THROW(ops::MergePartial(ctx, o, lse, ctx.Zeros({2, 1, 4}, DType::kF64), lse),
               InvalidArgument);
  EXPECT_THROW(ops::MergePartial(ctx, o, lse, o, Tensor()), InvalidArgument);
  Tensor half = ctx.Zeros({2, 1, 4}, DType::kBF16);
  EXPECT_THROW(ops::MergePartial(ctx, half, lse, half, lse), InvalidArgument);
}

TEST(DeltaTest, SumsProductsOfAnyDtypes) {
  Context ctx = OpContext();
  const Vec o = Normal(3 * 2 * 10, 1, DType::kBF16), d_out = Normal(3 * 2 * 10, 2, DType::kBF16);
  Vec want(6);
  for (size_t i = 0; i < o.size(); ++i) want[i / 10] += o[i] * d_out[i];
  for (const DType a : {DType::kF32, DType::kBF16}) {
    for (const DType b : {DType::kF32, DType::kBF16}) {
      const Tensor delta = ops::AttentionDelta(ctx, FromVec(ctx, {3, 2, 10}, a, d_out),
                                               FromVec(ctx, {3, 2, 10}, b, o));
      EXPECT_EQ(delta.dtype(), DType::kF32);
      EXPECT_LT(RelMax(ToVec(delta), want), 1e-6);
    }
  }
  for (const int64_t dim : kWidths) {
    for (const MakeTensor make : kAlignments) {
      const int64_t tokens = 41, heads = 3;
      const Vec left = Normal(tokens * heads * dim, 3), right = Normal(tokens * heads * dim, 4);
      Vec sums(static_cast<size_t>(tokens * heads));
      for (size_t i = 0; i < left.size(); ++i)
        sums[i / static_cast<size_t>(dim)] += left[i] * right[i];
      const Tensor delta =
          ops::AttentionDelta(ctx, make(ctx, {tokens, heads, dim}, DType::kF32, left),
                              make(ctx, {tokens, heads, dim}, DType::kF32, right));
      EXPECT_LT(RelMax(ToVec(delta), sums), 1e-6) << dim;
    }
  }
  const Tensor f64 = FromVec(ctx, {3, 2, 10}, DType::kF64, o);
  EXPECT_THROW(ops::AttentionDelta(ctx, f64, FromVec(ctx, {3, 2, 10}, DType::kF32, o)),
               InvalidArgument);
  EXPECT_THROW(ops::AttentionDelta(ctx, f64, FromVec(ctx, {3, 1, 20}, DType::kF64, o)),
               InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
