#include "ops/attention/seer_gate.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>

#include "ops/attention/attention.h"
#include "ops/core/rng.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using ops::SeerBlocks;

// Two rows of 300 tokens, the last block short; a document that begins inside a block.
constexpr int64_t kLength = 300, kRows = 2, kTokens = kRows * kLength;
std::shared_ptr<const ops::Documents> TwoRows() {
  return std::make_shared<const ops::Documents>(
      ops::Documents::FromEnds(kLength, {{kLength}, {150, 170, kLength}}));
}

struct Attention {
  std::shared_ptr<const ops::Documents> documents = TwoRows();
  ops::BlockList all = ops::BlockList::All(*documents);
  std::shared_ptr<const ops::BlockMask> mask;
  int64_t heads, kv_heads, dim;
  Vec q, k, v;

  Attention(int64_t heads, int64_t kv_heads, int64_t dim, DType dtype)
      : mask(ops::BlockMask::Build(ops::AttentionPattern::Causal(), kv_heads, documents, all, all)),
        heads(heads),
        kv_heads(kv_heads),
        dim(dim),
        q(Normal(kTokens * heads * dim, 1, dtype)),
        k(Normal(kTokens * kv_heads * dim, 2, dtype)),
        v(Normal(kTokens * kv_heads * dim, 3, dtype)) {}

  bool Sees(int64_t i, int64_t j) const {
    const auto begin = [&](int64_t t) { return documents->doc_begin[static_cast<size_t>(t)]; };
    return j <= i && begin(i) == begin(j);
  }
  // Probabilities of query i and head h; `keeps` says which other keys are left out.
  Vec Map(int64_t i, int64_t h, const std::function<bool(int64_t)>& keeps) const {
    const int64_t kv = h / (heads / kv_heads);
    Vec p(kTokens);
    double top = -1e300, sum = 0;
    const auto score = [&](int64_t j) {
      double s = 0;
      for (int64_t d = 0; d < dim; ++d) {
        s += q[static_cast<size_t>((i * heads + h) * dim + d)] *
             k[static_cast<size_t>((j * kv_heads + kv) * dim + d)];
      }
      return s / std::sqrt(static_cast<double>(dim));
    };
    for (int64_t j = 0; j <= i; ++j) {
      if (Sees(i, j) && keeps(j)) top = std::max(top, score(j));
    }
    for (int64_t j = 0; j <= i; ++j) {
      if (!Sees(i, j) || !keeps(j)) continue;
      p[static_cast<size_t>(j)] = std::exp(score(j) - top);
      sum += p[static_cast<size_t>(j)];
    }
    for (double& x : p) x /= sum;
    return p;
  }
  ops::AttentionResult Run(Context& ctx, DType dtype, const ops::BlockMask& on,
                           const ops::AttentionOptions& options) const {
    const Tensor tk = FromVec(ctx, {kTokens, kv_heads, dim}, dtype, k);
    const Tensor tv = FromVec(ctx, {kTokens, kv_heads, dim}, dtype, v);
    return ops::AttentionForward(ctx, FromVec(ctx, {kTokens, heads, dim}, dtype, q),
                                 ops::MakeKvView(tk, tv, on), on, options);
  }
};

// Blocks of 64 tokens of the row of a token, over all rows.
constexpr int64_t kFine = 5;  // a row
int64_t FineBlock(int64_t token) { return token / kLength * kFine + token % kLength / 64; }

TEST(SeerGateTest, BlockMaximaAreThoseOfTheMap) {
  for (const auto& [heads, kv_heads, dim] : {std::tuple{4, 2, 16}, std::tuple{3, 1, 40}}) {
    for (const DType dtype : kFloatDtypes) {
      const Attention a(heads, kv_heads, dim, dtype);
      Vec expected(static_cast<size_t>(kv_heads * kRows * kFine * kRows * kFine));
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < kTokens; ++i) {
          const Vec p = a.Map(i, h, [](int64_t) { return true; });
          const int64_t row = (h / (heads / kv_heads)) * kRows * kFine + FineBlock(i);
          for (int64_t j = 0; j <= i; ++j) {
            double& at = expected[static_cast<size_t>(row * kRows * kFine + FineBlock(j))];
            at = std::max(at, p[static_cast<size_t>(j)]);
          }
        }
      }
      int ran = 0;
      for (const auto& entry : ops::AttentionImplementations()) {
        const ops::AttentionProblem problem{.dtype = dtype,
                                            .heads = heads,
                                            .kv_heads = kv_heads,
                                            .head_dim = dim,
                                            .block_maxima = true};
        if (entry.device != DeviceKind::kCpu) continue;
        Context ctx({.threads = 2, .poison_buffers = true});
        ops::AttentionOptions options{.implementation = entry.name, .want_block_maxima = true};
        if (!entry.rejects(problem).empty()) {
          EXPECT_THROW(a.Run(ctx, dtype, *a.mask, options), InvalidArgument) << entry.name;
          continue;
        }
        ++ran;
        const auto result = a.Run(ctx, dtype, *a.mask, options);
        ASSERT_EQ(result.block_maxima.dtype(), AccumulatorOf(dtype));
        const Vec maxima = ToVec(result.block_maxima);
        EXPECT_LT(RelMax(maxima, expected), dtype == DType::kF64 ? 1e-13 : 3e-6)
            << entry.name << " " << ToString(dtype);
        for (size_t n = 0; n < maxima.size(); ++n) EXPECT_EQ(maxima[n] == 0, expected[n] == 0);
        options.want_block_maxima = false;
        const auto plain = a.Run(ctx, dtype, *a.mask, options);
        EXPECT_FALSE(plain.block_maxima.defined());
        EXPECT_TRUE(SameBits(plain.o, result.o)) << entry.name;
      }
      EXPECT_GE(ran, dtype == DType::kF64 ? 1 : 2);
      Context ctx({.threads = 1});  // the choice without a name finds one that can
      EXPECT_TRUE(a.Run(ctx, dtype, *a.mask, {.implementation = {}, .want_block_maxima = true})
                      .block_maxima.defined());
    }
  }
}

TEST(SeerGateTest, BlocksKnowWhatTheyMaySee) {
  const SeerBlocks fine = SeerBlocks::Of(*TwoRows(), 64);
  EXPECT_EQ(fine.count(), 10);
  // Row 1: block 2 (tokens 128..191) holds the end of the first document, which began in block 0;
  // block 3 begins in the third document, which began at 170, in block 2.
  EXPECT_EQ(fine.first_key, (std::vector<int32_t>{0, 0, 0, 0, 0, 5, 5, 5, 7, 7}));
  const SeerBlocks coarse = SeerBlocks::Of(*TwoRows(), 128);
  EXPECT_EQ(coarse.first_key, (std::vector<int32_t>{0, 0, 0, 3, 3, 4}));
  EXPECT_EQ(ops::SeerCountedRows(coarse, 1), 4);
  for (const int64_t size : {int64_t{0}, int64_t{96}, int64_t{1} << 40}) {
    EXPECT_THROW(SeerBlocks::Of(*TwoRows(), size), InvalidArgument) << size;
  }
}

TEST(SeerGateTest, PoolsQueriesOfTheGroupAndKeys) {
  for (const int64_t block : {64, 128}) {
    for (const DType dtype : kFloatDtypes) {
      const Attention a(4, 2, 6, dtype);
      Context ctx({.threads = 3, .poison_buffers = true});
      const SeerBlocks blocks = SeerBlocks::Of(*a.documents, block);
      const auto pooled = ops::SeerPool(ctx, FromVec(ctx, {kTokens, 4, 6}, dtype, a.q),
                                        FromVec(ctx, {kTokens, 2, 6}, dtype, a.k), blocks);
      Vec queries, keys;
      for (int64_t h = 0; h < 2; ++h) {
        for (int64_t n = 0; n < blocks.count(); ++n) {
          const int64_t row = n / blocks.per_row();
          const int64_t begin = row * kLength + n % blocks.per_row() * block;
          const int64_t end = std::min(begin + block, (row + 1) * kLength);
          Vec most(6, -1e300), least(6, 1e300), mean(6), query(6);
          for (int64_t t = begin; t < end; ++t) {
            for (int64_t d = 0; d < 6; ++d) {
              const auto at = static_cast<size_t>(d);
              const double key = a.k[static_cast<size_t>((t * 2 + h) * 6 + d)];
              most[at] = std::max(most[at], key);
              least[at] = std::min(least[at], key);
              mean[at] += key / static_cast<double>(end - begin);
              for (int64_t g = 2 * h; g < 2 * h + 2; ++g) {
                query[at] += a.q[static_cast<size_t>((t * 4 + g) * 6 + d)] / 2 /
                             static_cast<double>(end - begin);
              }
            }
          }
          queries.insert(queries.end(), query.begin(), query.end());
          for (const Vec* part : {&most, &least, &mean}) {
            keys.insert(keys.end(), part->begin(), part->end());
          }
        }
      }
      EXPECT_LE(RelRms(ToVec(pooled.queries), queries), Bound(dtype, queries));
      EXPECT_LE(RelRms(ToVec(pooled.keys), keys), Bound(dtype, keys));
    }
  }
}

// A gate over the two rows, with targets of which some are zero.
struct GateCase {
  SeerBlocks blocks;
  int64_t width = 6;
  Vec q, k, maxima;  // maxima: as the kernels give them, 64-token blocks

  explicit GateCase(int64_t block) : blocks(SeerBlocks::Of(*TwoRows(), block)) {
    q = Normal(2 * blocks.count() * width, 5);
    k = Normal(2 * blocks.count() * width, 6);
    maxima = Uniform(2 * 100, 7, 0, 1);
    for (size_t n = 0; n < maxima.size(); n += 7) maxima[n] = 0;
    for (int64_t n = 0; n < 200; ++n) {  // a block always sees itself
      if (n % 100 / 10 == n % 10) maxima[static_cast<size_t>(n)] = 0.5;
    }
    maxima = RoundedTo(DType::kF32, maxima);
  }
  double Score(int64_t h, int64_t i, int64_t j) const {
    double s = 0;
    for (int64_t d = 0; d < width; ++d) {
      s += q[static_cast<size_t>((h * blocks.count() + i) * width + d)] *
           k[static_cast<size_t>((h * blocks.count() + j) * width + d)];
    }
    return s / std::sqrt(static_cast<double>(width));
  }
  double Target(int64_t h, int64_t i, int64_t j) const {
    const int64_t each = blocks.block_size / 64, per_row = blocks.per_row();
    double most = 0;
    for (int64_t y = 0; y < each; ++y) {
      for (int64_t x = 0; x < each; ++x) {
        const int64_t a = i % per_row * each + y, b = j % per_row * each + x;
        if (a >= kFine || b >= kFine) continue;
        const int64_t row = i / per_row * kFine + a, column = j / per_row * kFine + b;
        most = std::max(most, maxima[static_cast<size_t>(h * 100 + row * 10 + column)]);
      }
    }
    return most;
  }
  double Loss(int64_t skip) const {
    double loss = 0;
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t i = 0; i < blocks.count(); ++i) {
        if (i % blocks.per_row() < skip) continue;
        const int64_t first = blocks.first_key[static_cast<size_t>(i)];
        double gate = 0, target = 0;
        for (int64_t j = first; j <= i; ++j) {
          gate += std::exp(Score(h, i, j));
          target += Target(h, i, j);
        }
        for (int64_t j = first; j <= i; ++j) {
          const double t = Target(h, i, j) / target, a = std::exp(Score(h, i, j)) / gate;
          if (t > 0) loss += t * std::log(t / a);
        }
      }
    }
    return loss;
  }
  Shape shape() const { return {2, blocks.count(), width}; }
};

TEST(SeerGateTest, LossAndGradientMatchTheDefinition) {
  for (const int64_t block : {64, 128}) {
    for (const int64_t skip : {0, 1}) {
      for (const DType dtype : {DType::kF64, DType::kF32}) {
        GateCase c(block);
        Context ctx({.threads = 2, .poison_buffers = true});
        const auto loss = ops::SeerDistill(
            ctx, FromVec(ctx, c.shape(), dtype, c.q), FromVec(ctx, c.shape(), dtype, c.k),
            FromVec(ctx, {2, 10, 10}, dtype, c.maxima), c.blocks, skip, /*weight=*/0.5);
        const double tolerance = dtype == DType::kF64 ? 1e-12 : 1e-5;
        EXPECT_NEAR(loss.sum, c.Loss(skip), tolerance * c.Loss(skip));
        const Vec dq = NumericGradient(c.q, [&] { return 0.5 * c.Loss(skip); });
        const Vec dk = NumericGradient(c.k, [&] { return 0.5 * c.Loss(skip); });
        EXPECT_LT(RelRms(ToVec(loss.dq), dq), dtype == DType::kF64 ? 1e-8 : 1e-5);
        EXPECT_LT(RelRms(ToVec(loss.dk), dk), dtype == DType::kF64 ? 1e-8 : 1e-5);
      }
    }
  }
}

TEST(SeerGateTest, AGateThatKnowsTheTargetCostsNothing) {
  GateCase c(64);
  Context ctx({.threads = 2});
  // Targets that are the gate's own softmax, up to a factor a row.
  for (int64_t n = 0; n < 200; ++n) {
    const int64_t h = n / 100, i = n % 100 / 10, j = n % 10;
    const bool seen = j <= i && j >= c.blocks.first_key[static_cast<size_t>(i)];
    c.maxima[static_cast<size_t>(n)] =
        seen ? std::exp(c.Score(h, i, j)) * (1.0 + static_cast<double>(i)) : 0;
  }
  const auto loss = ops::SeerDistill(
      ctx, FromVec(ctx, c.shape(), DType::kF64, c.q), FromVec(ctx, c.shape(), DType::kF64, c.k),
      FromVec(ctx, {2, 10, 10}, DType::kF64, c.maxima), c.blocks, 0, 1);
  EXPECT_NEAR(loss.sum, 0, 1e-12);
  for (const double g : ToVec(loss.dq)) EXPECT_NEAR(g, 0, 1e-12);
}

std::set<int32_t> KeptOf(const ops::KeptBlocks& kept, int64_t row) {
  const auto at = static_cast<size_t>(row);
  EXPECT_TRUE(std::is_sorted(kept.blocks.begin() + kept.offsets[at],
                             kept.blocks.begin() + kept.offsets[at + 1]));
  return {kept.blocks.begin() + kept.offsets[at], kept.blocks.begin() + kept.offsets[at + 1]};
}

TEST(SeerGateTest, SelectionIsARankOrAShare) {
  const GateCase c(64);
  Context ctx({.threads = 1});
  const auto select = [&](const ops::SeerSelection& selection) {
    ops::SeerSelect(ctx, FromVec(ctx, c.shape(), DType::kF64, c.q),
                    FromVec(ctx, c.shape(), DType::kF64, c.k), c.blocks, selection);
  };
  EXPECT_NO_THROW(select({.top_k = 1}));
  EXPECT_NO_THROW(select({.threshold = 0.99}));
  for (const ops::SeerSelection& wrong :
       {ops::SeerSelection{}, ops::SeerSelection{.top_k = -1},
        ops::SeerSelection{.top_k = -1, .threshold = 0.1},
        ops::SeerSelection{.top_k = 2, .threshold = 0.1}, ops::SeerSelection{.threshold = 1},
        ops::SeerSelection{.top_k = 2, .threshold = -0.1},
        ops::SeerSelection{.threshold = std::nan("")}}) {
    EXPECT_THROW(select(wrong), InvalidArgument) << wrong.top_k << " " << wrong.threshold;
  }
}

TEST(SeerGateTest, KeepsTheEndsAndTheBest) {
  for (const int64_t block : {64, 128}) {
    for (const auto& selection :
         {ops::SeerSelection{.top_k = 2}, ops::SeerSelection{.top_k = 3},
          ops::SeerSelection{.top_k = 9}, ops::SeerSelection{.threshold = 0.15}}) {
      const GateCase c(block);
      Context ctx({.threads = 2});
      const auto kept =
          ops::SeerSelect(ctx, FromVec(ctx, c.shape(), DType::kF64, c.q),
                          FromVec(ctx, c.shape(), DType::kF64, c.k), c.blocks, selection);
      ASSERT_EQ(kept.offsets.size(), 2u * 10 + 1);
      const int64_t each = block / 64, per_row = c.blocks.per_row();
      for (int64_t h = 0; h < 2; ++h) {
        for (int64_t query = 0; query < 10; ++query) {
          const int64_t row = query / kFine, i = row * per_row + query % kFine / each;
          const int64_t first = c.blocks.first_key[static_cast<size_t>(i)];
          double total = 0;
          for (int64_t j = first; j <= i; ++j) total += std::exp(c.Score(h, i, j));
          std::set<int32_t> expected;
          for (int64_t j = first; j <= i; ++j) {
            // How many of the blocks between the ends come before this one.
            int64_t better = 0;
            for (int64_t other = first + 1; other < i; ++other) {
              better += c.Score(h, i, other) > c.Score(h, i, j);
            }
            const bool end = j == first || j == i;
            const bool best = selection.top_k > 0
                                  ? better < selection.top_k - 2
                                  : std::exp(c.Score(h, i, j)) / total >= selection.threshold;
            if (!end && !best) continue;
            for (int64_t x = 0; x < each; ++x) {
              const int64_t fine = j % per_row * each + x;
              if (fine < kFine) expected.insert(static_cast<int32_t>(row * kFine + fine));
            }
          }
          EXPECT_EQ(KeptOf(kept, h * 10 + query), expected)
              << selection.ToString() << " block " << block << " head " << h << " query " << query;
        }
      }
    }
  }
}

TEST(SeerGateTest, EqualBlocksGoToTheLower) {
  GateCase c(64);
  std::fill(c.q.begin(), c.q.end(), 0.0);
  Context ctx({.threads = 1});
  const auto kept =
      ops::SeerSelect(ctx, FromVec(ctx, c.shape(), DType::kF64, c.q),
                      FromVec(ctx, c.shape(), DType::kF64, c.k), c.blocks, {.top_k = 3});
  EXPECT_EQ(KeptOf(kept, 4), (std::set<int32_t>{0, 1, 4}));
}

// The restricted mask holds the entries that are left, with their kinds, along both axes, and
// attention over it sees exactly those keys.
TEST(SeerGateTest, ARestrictedMaskIsTheMaskWithoutTheRest) {
  const Attention a(4, 2, 16, DType::kF64);
  const Philox rng(17, StreamOf("kept blocks"));
  ops::KeptBlocks kept;
  std::vector<std::set<int32_t>> rows;
  for (uint64_t row = 0; row < 20; ++row) {
    std::set<int32_t> some;
    for (uint64_t j = 0; j < 10; ++j) {
      // Also blocks that the mask lacks; the own block only sometimes, so that rows are empty.
      if (rng.Uniform(10 * row + j) < 0.5) some.insert(static_cast<int32_t>(j));
    }
    kept.blocks.insert(kept.blocks.end(), some.begin(), some.end());
    kept.offsets.push_back(static_cast<int64_t>(kept.blocks.size()));
    rows.push_back(some);
  }
  const auto less = a.mask->Restrict(kept);
  using Entry = std::tuple<int64_t, int32_t, int32_t, bool>;  // kv head, query, key, partial
  const auto entries = [](const ops::BlockMask& mask, bool along_rows) {
    std::set<Entry> all;
    const ops::BlockRuns& runs = along_rows ? mask.row_runs() : mask.column_runs();
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t n = 0; n < 10; ++n) {
        bool partial = false;
        for (const ops::BlockRun& run : runs.Row(mask.pattern_of(h), n)) {
          EXPECT_FALSE(partial && !run.partial) << "full runs come first";
          partial = run.partial;
          for (int32_t i = 0; i < run.count; ++i) {
            const int32_t line = static_cast<int32_t>(n), other = run.block(i);
            EXPECT_TRUE(all.insert({h, along_rows ? line : other, along_rows ? other : line,
                                    run.partial != 0})
                            .second);
          }
        }
      }
    }
    return all;
  };
  std::set<Entry> expected;
  for (const Entry& entry : entries(*a.mask, true)) {
    const auto& [h, query, key, partial] = entry;
    if (rows[static_cast<size_t>(h * 10 + query)].count(key)) expected.insert(entry);
  }
  EXPECT_GT(expected.size(), 10u);
  EXPECT_EQ(entries(*less, true), expected);
  EXPECT_EQ(entries(*less, false), expected);

  const auto keeps = [&](int64_t i, int64_t j, int64_t kv_head) {
    return rows[static_cast<size_t>(kv_head * 10 + FineBlock(i))].count(
               static_cast<int32_t>(FineBlock(j))) > 0;
  };
  int64_t pairs = 0;
  Vec o(static_cast<size_t>(kTokens * 4 * 16));
  for (int64_t i = 0; i < kTokens; ++i) {
    for (int64_t h = 0; h < 4; ++h) {
      bool any = false;
      for (int64_t j = 0; j <= i; ++j) {
        const bool seen = a.Sees(i, j) && keeps(i, j, h / 2);
        any = any || seen;
        if (h % 2 == 0) pairs += seen;
      }
      if (!any) continue;  // o stays 0
      const Vec p = a.Map(i, h, [&](int64_t j) { return keeps(i, j, h / 2); });
      for (int64_t j = 0; j <= i; ++j) {
        for (int64_t d = 0; d < 16; ++d) {
          o[static_cast<size_t>((i * 4 + h) * 16 + d)] +=
              p[static_cast<size_t>(j)] * a.v[static_cast<size_t>((j * 2 + h / 2) * 16 + d)];
        }
      }
    }
  }
  EXPECT_EQ(less->TotalVisiblePairs(), pairs);
  Context ctx({.threads = 2});
  EXPECT_LT(RelMax(ToVec(a.Run(ctx, DType::kF64, *less, {}).o), o), 1e-12);
  EXPECT_LT(RelMax(ToVec(a.Run(ctx, DType::kF32, *less, {}).o), o), 1e-5);
  EXPECT_THROW(a.mask->Restrict({}), InvalidArgument);
}

TEST(SeerGateTest, SameBitsForAnyThreads) {
  const GateCase c(64);
  const Attention a(4, 2, 16, DType::kF32);
  std::vector<Tensor> expected;
  for (const int threads : {1, 2, 3}) {
    Context ctx({.threads = threads, .poison_buffers = true});
    const auto result =
        a.Run(ctx, DType::kF32, *a.mask, {.implementation = {}, .want_block_maxima = true});
    const auto loss = ops::SeerDistill(
        ctx, FromVec(ctx, c.shape(), DType::kF32, c.q), FromVec(ctx, c.shape(), DType::kF32, c.k),
        FromVec(ctx, {2, 10, 10}, DType::kF32, c.maxima), c.blocks, 0, 1);
    const std::vector<Tensor> actual = {result.block_maxima, loss.dq, loss.dk};
    if (expected.empty()) expected = actual;
    for (size_t n = 0; n < actual.size(); ++n) EXPECT_TRUE(SameBits(actual[n], expected[n])) << n;
  }
}

}  // namespace
}  // namespace longspan::test
