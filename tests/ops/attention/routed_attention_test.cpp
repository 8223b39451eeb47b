// Attention to chosen blocks with a rank's share of the queries, and with keys that lie anywhere in
// any order: what context parallelism runs, against the whole problem in plain tensors.
#include "ops/attention/routed_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>

#include "ops/attention/moba.h"
#include "tests/ops/attention/moba_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

MobaCase Case(int64_t length, const std::vector<std::vector<int64_t>>& ends, int64_t block_size,
              int64_t dim, DType dtype) {
  MobaCase c;
  c.problem = {
      .documents = std::make_shared<const ops::Documents>(ops::Documents::FromEnds(length, ends)),
      .block_size = block_size,
      .top_k = 3,
      .heads = 4,
      .kv_heads = 2,
      .dim = dim,
      .scale = 0.3};
  c.dtype = dtype;
  return c;
}

// The tokens of every second mask block, in order.
struct Share {
  ops::BlockList list;
  std::vector<int64_t> tokens;  // global
};
Share EverySecond(const ops::Documents& documents, size_t first) {
  const ops::BlockList all = ops::BlockList::All(documents);
  Share share;
  share.list.token_begin = {0};
  for (size_t i = first; i < all.ids.size(); i += 2) {
    share.list.ids.push_back(all.ids[i]);
    for (int64_t t = all.token_begin[i]; t < all.token_begin[i + 1]; ++t) share.tokens.push_back(t);
    share.list.token_begin.push_back(static_cast<int64_t>(share.tokens.size()));
  }
  return share;
}

Vec Rows(const Vec& from, const std::vector<int64_t>& tokens, int64_t width) {
  Vec rows;
  for (const int64_t t : tokens) {
    rows.insert(rows.end(), from.begin() + t * width, from.begin() + (t + 1) * width);
  }
  return rows;
}

// K and V of all blocks and kv heads, side by side as [rows, 2, D], the (block, kv head) pairs and
// the tokens of each shuffled.
struct Arena {
  std::shared_ptr<const ops::KvTable> table;
  std::vector<std::pair<int64_t, int64_t>> row_of;  // (token, kv head) of every row
};
Arena Shuffled(const ops::RoutedBlocks& blocks, int64_t kv_heads, int64_t dim, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int64_t> pieces(static_cast<size_t>(blocks.count() * kv_heads));
  std::iota(pieces.begin(), pieces.end(), 0);
  std::shuffle(pieces.begin(), pieces.end(), random);
  Arena arena;
  std::vector<int64_t> offsets(pieces.size());
  for (const int64_t piece : pieces) {
    const int64_t head = piece / blocks.count(), block = piece % blocks.count();
    offsets[static_cast<size_t>(piece)] = static_cast<int64_t>(arena.row_of.size()) * 2 * dim;
    std::vector<int64_t> tokens(static_cast<size_t>(blocks.TokensOf(block)));
    std::iota(tokens.begin(), tokens.end(), blocks.begin[static_cast<size_t>(block)]);
    std::shuffle(tokens.begin(), tokens.end(), random);
    for (const int64_t t : tokens) arena.row_of.emplace_back(t, head);
  }
  arena.table = std::make_shared<const ops::KvTable>(kv_heads, 2 * dim, 0, std::move(offsets));
  return arena;
}
// The two planes of rows [R, 2, D].
std::pair<Tensor, Tensor> Planes(const Tensor& rows) {
  const int64_t vectors = 2 * rows.dim(0);
  const Tensor flat = rows.Reshape({vectors, rows.dim(2)});
  return {flat.Rows(0, vectors - 1), flat.Rows(1, vectors)};
}

double Tolerance(DType dtype, const std::string& implementation) {
  if (dtype == DType::kF64) return 1e-12;
  return implementation.ends_with("_bf16") ? 2e-2 : 5e-6;
}

void ExpectSharesAddUp(const MobaCase& c, const std::string& name) {
  const std::string what = c.Name() + " " + name;
  const MobaProblem& p = c.problem;
  const int64_t query = p.heads * p.dim, key = p.kv_heads * p.dim, stats = p.heads;
  const MobaInputs in = MakeMobaInputs(c);
  Context ctx = OpContext();
  const MobaRun whole = RunMoba(ctx, c, in, name);
  MobaCase own_case = c;
  own_case.problem.top_k = 1;
  const MobaRun own = RunMoba(ctx, own_case, in, name);
  const auto plan = MobaPlanOf(c);
  const ops::RoutedBlocks& blocks = *plan->blocks;
  const int64_t width = plan->width();
  const DType wide = AccumulatorOf(c.dtype);
  const ops::AttentionOptions options{.scale = p.scale, .implementation = name};
  const Tensor all_k = FromVec(ctx, {p.tokens(), p.kv_heads, p.dim}, c.dtype, in.k);
  const Tensor means = ops::BlockMeans(ctx, all_k, blocks, plan->share);

  const Arena arena = Shuffled(blocks, p.kv_heads, p.dim, 5);
  Vec rows;
  for (const auto& [t, h] : arena.row_of) {
    for (const Vec* plane : {&in.k, &in.v}) {
      const auto at = plane->begin() + t * key + h * p.dim;
      rows.insert(rows.end(), at, at + p.dim);
    }
  }
  const auto count = static_cast<int64_t>(arena.row_of.size());
  const auto [k, v] = Planes(FromVec(ctx, {count, 2, p.dim}, c.dtype, rows));
  const ops::KvView kv{k, v, p.dim, arena.table};
  Vec dk(in.k.size()), dv(in.k.size()), mean_sum(static_cast<size_t>(means.numel()));
  // The sums, from the definition.
  const MobaChoice choice = ChoiceOf(c, whole.selected);
  const MobaOracleGradients exact = MobaOracleBackward(p, choice, in.q, in.k, in.v, in.d_out);
  for (const size_t first : {size_t{0}, size_t{1}}) {
    const Share mine = EverySecond(*p.documents, first);
    const auto share = ops::RoutedShare::Of(blocks, mine.list);
    const auto queries = ops::RoutedQueries::Of(blocks, share);
    const auto t = static_cast<int64_t>(mine.tokens.size());
    ASSERT_EQ(share.rows(), t);
    const auto local = [&](const Vec& values, int64_t heads, DType dtype) {
      return FromVec(ctx, {t, heads, p.dim}, dtype, Rows(values, mine.tokens, heads * p.dim));
    };
    const Tensor q = local(in.q, p.heads, c.dtype), d_out = local(in.d_out, p.heads, c.dtype);
    const Vec part = ToVec(ops::BlockMeans(ctx, local(in.k, p.kv_heads, c.dtype), blocks, share));
    for (int64_t i = 0; i < share.count(); ++i) {
      for (int64_t d = 0; d < key; ++d) {
        mean_sum[static_cast<size_t>(share.block[static_cast<size_t>(i)] * key + d)] +=
            part[static_cast<size_t>(i * key + d)];
      }
    }

    const Tensor selected = ops::SelectBlocks(ctx, q, means, *queries, width, options);
    std::vector<int32_t> chosen(static_cast<size_t>(selected.numel())), expected;
    CopyToHost(selected, chosen.data());
    for (int64_t h = 0; h < p.heads; ++h) {
      for (const int64_t token : mine.tokens) {
        const auto at = whole.selected.begin() + (h * p.tokens() + token) * width;
        expected.insert(expected.end(), at, at + width);
      }
    }
    ASSERT_EQ(chosen, expected) << what;
    const ops::RoutedLists lists = ops::BuildRoutedLists(ctx, selected, blocks.count());

    Tensor o = local(own.o, p.heads, wide);
    Tensor lse = FromVec(ctx, {t, p.heads}, wide, Rows(own.lse, mine.tokens, stats));
    ops::RoutedForward(ctx, q, kv, blocks, *queries, lists, o, lse, options);
    const double tolerance = Tolerance(c.dtype, name);
    const Vec whole_o = Rows(whole.o, mine.tokens, query);
    EXPECT_LT(RelRms(ToVec(o), whole_o), tolerance) << what;
    EXPECT_LT(RelMax(ToVec(lse), Rows(whole.lse, mine.tokens, stats)), tolerance) << what;

    // Gradients of both parts: of the own block by mask, of chosen ones by lists.
    const Tensor final_o = local(whole.o, p.heads, wide);
    const Tensor final_lse = FromVec(ctx, {t, p.heads}, wide, Rows(whole.lse, mine.tokens, stats));
    const Tensor delta = ops::AttentionDelta(ctx, d_out, final_o);
    const auto cut = ops::BlocksAsDocuments(blocks);
    const auto mask = ops::BlockMask::Build(ops::AttentionPattern::Causal(), p.kv_heads, cut,
                                            mine.list, ops::BlockList::All(*cut));
    const Tensor all_v = FromVec(ctx, all_k.shape(), c.dtype, in.v);
    Tensor dq = ctx.Zeros(q.shape(), wide), own_dk = ctx.Zeros(all_k.shape(), wide),
           own_dv = ctx.Zeros(all_k.shape(), wide);
    ops::AttentionBackward(ctx, d_out, q, ops::MakeKvView(all_k, all_v, *mask), final_lse, delta,
                           *mask, dq, ops::MakeKvGradView(own_dk, own_dv, *mask), options);
    const Tensor grads = ctx.Zeros({count, 2, p.dim}, wide);
    const auto [grad_k, grad_v] = Planes(grads);
    const ops::RoutedBackward back{d_out, q, kv, final_lse, delta, blocks, *queries, lists};
    ops::RoutedKeyGradient(ctx, back, {grad_k, grad_v, arena.table}, options);
    ops::RoutedQueryGradient(ctx, back, dq, options);
    EXPECT_LT(RelRms(ToVec(dq), Rows(exact.dq, mine.tokens, query)), tolerance) << what;
    const Vec grad_rows = ToVec(grads), own_k = ToVec(own_dk), own_v = ToVec(own_dv);
    for (size_t i = 0; i < dk.size(); ++i) dk[i] += own_k[i], dv[i] += own_v[i];
    for (int64_t i = 0; i < count; ++i) {
      const auto [token, head] = arena.row_of[static_cast<size_t>(i)];
      for (int64_t d = 0; d < p.dim; ++d) {
        const auto to = static_cast<size_t>(token * key + head * p.dim + d);
        dk[to] += grad_rows[static_cast<size_t>(2 * i * p.dim + d)];
        dv[to] += grad_rows[static_cast<size_t>((2 * i + 1) * p.dim + d)];
      }
    }
  }
  EXPECT_LT(RelMax(mean_sum, ToVec(means)), c.dtype == DType::kF64 ? 1e-13 : 1e-6) << what;
  EXPECT_LT(RelRms(dk, exact.dk), Tolerance(c.dtype, name)) << what;
  EXPECT_LT(RelRms(dv, exact.dv), Tolerance(c.dtype, name)) << what;
}

TEST(RoutedAttentionTest, SharesOfTheQueriesWithScatteredKeysAddUp) {
  for (const DType dtype : FloatDtypes()) {
    // Of f64 there is one implementation, which goes row by row.
    const int64_t length = OnCuda() || dtype == DType::kF64 ? 700 : 1400;
    for (const MobaCase& c :
         {Case(300, {{70, 220, 300}, {300}}, 64, 24, dtype), Case(500, {{500}}, 192, 8, dtype),
          Case(length, {{length}}, 640, 16, dtype)}) {
      Context ctx = OpContext();
      const auto names = MobaImplementationsFor(ctx, c);
      ASSERT_FALSE(names.empty());
      for (const std::string& name : names) {
        ExpectSharesAddUp(c, name);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(RoutedAttentionTest, SharesAreTheTokensOfTheBlocks) {
  const auto documents =
      std::make_shared<const ops::Documents>(ops::Documents::FromEnds(300, {{100, 300}, {300}}));
  const auto blocks = ops::RoutedBlocks::Build(128, documents);
  // Row 0: [0, 100), [100, 128), [128, 256), [256, 300); row 1: [0, 128), [128, 256), [256, 300).
  ASSERT_EQ(blocks->begin, (std::vector<int64_t>{0, 100, 128, 256, 300, 428, 556, 600}));
  // Mask blocks 1 ([64, 128)), 4 ([256, 300)) and 7 (row 1, [128, 192)).
  const ops::BlockList local{.ids = {1, 4, 7}, .token_begin = {0, 64, 108, 172}};
  const auto share = ops::RoutedShare::Of(*blocks, local);
  EXPECT_EQ(share.block, (std::vector<int32_t>{0, 1, 3, 5}));
  EXPECT_EQ(share.begin, (std::vector<int64_t>{0, 36, 64, 108, 172}));
  const auto nothing = ops::RoutedShare::Of(*blocks, {.ids = {}, .token_begin = {0}});
  EXPECT_EQ(nothing.rows(), 0);
  EXPECT_EQ(ops::RoutedQueries::Of(*blocks, nothing)->most_candidates, 2);
  EXPECT_THROW(ops::RoutedShare::Of(*blocks, {.ids = {4, 1}, .token_begin = {0, 44, 108}}),
               InvalidArgument);
}

TEST(RoutedAttentionTest, RefusesWhatDoesNotFit) {
  Context ctx = OpContext();
  const MobaCase c = Case(200, {{200}}, 64, 8, DType::kF32);
  const auto plan = MobaPlanOf(c);
  const Tensor q = ctx.Zeros({200, 4, 8}, DType::kF32), k = ctx.Zeros({200, 2, 8}, DType::kF32);
  const Tensor means = ctx.Zeros({4, 2, 8}, DType::kF32);
  const auto expect = [](const char* part, const std::function<void()>& call) {
    try {
      call();
      ADD_FAILURE() << "nothing refused: " << part;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  const auto select = [&](const Tensor& queries, const Tensor& m, int64_t width) {
    ops::SelectBlocks(ctx, queries, m, *plan->queries, width);
  };
  expect("q is f32[199, 4, 8]", [&] { select(ctx.Zeros({199, 4, 8}, DType::kF32), means, 1); });
  expect("means is f32[4, 2, 16]", [&] { select(q, ctx.Zeros({4, 2, 16}, DType::kF32), 1); });
  expect("width is 4", [&] { select(q, means, 4); });
  const ops::RoutedLists lists =
      ops::BuildRoutedLists(ctx, ops::SelectBlocks(ctx, q, means, *plan->queries, 2), 4);
  Tensor o = ctx.Zeros({200, 4, 8}, DType::kF32), lse = ctx.Zeros({200, 4}, DType::kF32);
  const auto forward = [&](const ops::KvView& kv) {
    ops::RoutedForward(ctx, q, kv, *plan->blocks, *plan->queries, lists, o, lse);
  };
  const ops::KvView good = ops::MakeRoutedKvView(k, k, *plan->blocks);
  forward(good);
  expect("3 blocks", [&] {
    forward({k, k, 8, std::make_shared<const ops::KvTable>(2, 16, 0, std::vector<int64_t>(6))});
  });
  expect("head_dim 16", [&] { forward({k, k, 16, good.table}); });
  expect("must have two of f32", [&] { forward({k, {}, 8, good.table}); });
  expect("must be two [200", [&] {
    ops::MakeRoutedKvView(k, ctx.Zeros({199, 2, 8}, DType::kF32), *plan->blocks);
  });
  expect("a multiple of groups", [&] { ops::ListedBlocks(ctx, lists, 3); });
}

}  // namespace
}  // namespace longspan::test
