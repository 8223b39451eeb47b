// MoBA against an oracle written from its definition, every implementation forced.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "tests/ops/attention/moba_fixture.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using Ends = std::vector<std::vector<int64_t>>;

std::shared_ptr<const ops::Documents> DocumentsOf(int64_t row_length, const Ends& ends) {
  return std::make_shared<const ops::Documents>(ops::Documents::FromEnds(row_length, ends));
}

std::vector<std::shared_ptr<const ops::Documents>> DocumentSets() {
  return {DocumentsOf(331, {{331}}),                       // one, odd
          DocumentsOf(300, {{70, 71, 200, 300}}),          // borders inside blocks
          DocumentsOf(211, {{64, 128, 211}, {100, 211}}),  // two rows, borders on blocks
          DocumentsOf(40, {{40}})};                        // less than a block
}

// Everything to test together; `Random` draws one of each.
struct Axes {
  std::vector<std::shared_ptr<const ops::Documents>> documents = DocumentSets();
  std::vector<int64_t> block_sizes{64, 128, 192}, top_ks{1, 2, 3, 100}, groups{1, 4, 16},
      kv_heads{1, 2}, dims{8, 20, 64, 96};
  std::vector<DType> dtypes{FloatDtypes().begin(), FloatDtypes().end()};
};

MobaCase MakeCase(std::shared_ptr<const ops::Documents> documents, int64_t block_size,
                  int64_t top_k, int64_t group, int64_t kv_heads, int64_t dim, DType dtype) {
  MobaCase c{.problem = {.documents = std::move(documents),
                         .block_size = block_size,
                         .top_k = top_k,
                         .heads = group * kv_heads,
                         .kv_heads = kv_heads,
                         .dim = dim},
             .dtype = dtype,
             .seed = 7};
  c.problem.scale = 1.3 / std::sqrt(static_cast<double>(dim));
  return c;
}

// Largest relative error against the oracle: all entries compute in f32 (f64) on operands that are
// represented exactly, so bf16 ones are no worse; but those named so round the operands of their
// products, and may be what runs unless one is forced ("").
double Tolerance(DType dtype, const std::string& implementation) {
  if (dtype == DType::kF64) return 1e-12;
  if (implementation.ends_with("_bf16")) return 1e-2;
  return implementation.empty() && dtype == DType::kBF16 ? 1e-2 : 3e-6;
}

// Each chosen gate is at least as large as each other one, but for rounding errors.
void ExpectLargestGates(const MobaCase& c, const MobaInputs& in, const MobaChoice& choice,
                        const std::string& what) {
  const MobaProblem& p = c.problem;
  const double slack = c.dtype == DType::kF64 ? 1e-13 : 1e-5;
  int64_t different = 0;
  const MobaChoice expected = MobaChoose(p, in.q, in.k);
  MobaGate gate(p, in.q, in.k);
  for (int64_t t = 0; t < p.tokens(); ++t) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const size_t row = static_cast<size_t>(t * p.heads + h);
      if (choice[row] == expected[row]) continue;
      ++different;
      const Vec gates = gate(t, h);
      double least = std::numeric_limits<double>::infinity(), most = -least;
      for (size_t i = 0; i < gates.size(); ++i) {
        const bool chosen = std::count(choice[row].begin(), choice[row].end(), i) > 0;
        if (chosen) least = std::min(least, gates[i]);
        if (!chosen) most = std::max(most, gates[i]);
      }
      EXPECT_GE(least, most - slack) << what << " token " << t << " head " << h;
    }
  }
  EXPECT_LE(different, p.tokens() * p.heads / 500) << what;
}

void ExpectMatchesOracle(Context& ctx, const MobaCase& c, const std::string& implementation) {
  const std::string what = c.Name() + " " + implementation;
  const MobaInputs in = MakeMobaInputs(c);
  const MobaRun run = RunMoba(ctx, c, in, implementation);
  const MobaChoice choice = ChoiceOf(c, run.selected);
  ExpectLargestGates(c, in, choice, what);
  if (testing::Test::HasFailure()) return;
  const MobaOutput out = MobaOracleForward(c.problem, choice, in.q, in.k, in.v);
  const MobaOracleGradients grads =
      MobaOracleBackward(c.problem, choice, in.q, in.k, in.v, in.d_out);
  const double tolerance = Tolerance(c.dtype, implementation);
  EXPECT_LT(RelRms(run.o, out.o), tolerance) << what;
  EXPECT_LT(RelMax(run.lse, out.lse), tolerance) << what;
  EXPECT_LT(RelRms(run.dq, grads.dq), tolerance) << what;
  EXPECT_LT(RelRms(run.dk, grads.dk), tolerance) << what;
  EXPECT_LT(RelRms(run.dv, grads.dv), tolerance) << what;
}

void ExpectMatchesOracle(const MobaCase& c) {
  Context ctx = OpContext();
  const std::vector<std::string> names = MobaImplementationsFor(ctx, c);
  ASSERT_FALSE(names.empty()) << c.Name();
  for (const std::string& name : names) ExpectMatchesOracle(ctx, c, name);
  ExpectMatchesOracle(ctx, c, "");
}

TEST(MobaTest, SampleMatchesOracle) {
  constexpr unsigned kSeed = 20250213;
  SCOPED_TRACE(Str("seed ", kSeed));
  std::mt19937 random(kSeed);
  const Axes axes;
  const auto pick = [&](const auto& values) { return values[random() % values.size()]; };
  for (int i = 0; i < (OnCuda() ? 12 : 40); ++i) {
    ExpectMatchesOracle(MakeCase(pick(axes.documents), pick(axes.block_sizes), pick(axes.top_ks),
                                 pick(axes.groups), pick(axes.kv_heads), pick(axes.dims),
                                 pick(axes.dtypes)));
    if (HasFailure()) return;
  }
}

TEST(MobaTest, ExhaustiveProductMatchesOracle) {
  const Axes axes;
  int64_t cases = 0;
  for (const auto& documents : axes.documents)
    for (const int64_t block_size : axes.block_sizes)
      for (const int64_t top_k : axes.top_ks)
        for (const int64_t group : axes.groups)
          for (const int64_t kv_heads : axes.kv_heads)
            for (const int64_t dim : axes.dims)
              for (const DType dtype : axes.dtypes) {
                ExpectMatchesOracle(
                    MakeCase(documents, block_size, top_k, group, kv_heads, dim, dtype));
                if (HasFailure()) return;
                ++cases;
              }
  std::printf("%lld cases\n", static_cast<long long>(cases));
}

// Blocks longer than the pieces that kernels keep packed, several segments of queries, lists of
// many tiles.
TEST(MobaTest, LongRowsAndLongBlocksMatchOracle) {
  const int64_t length = OnCuda() ? 700 : 2700;
  ExpectMatchesOracle(MakeCase(DocumentsOf(length, {{length}}), 64, 3, 2, 1, 16, DType::kF32));
  if (OnCuda()) return;
  ExpectMatchesOracle(MakeCase(DocumentsOf(2500, {{180, 2500}}), 640, 3, 1, 1, 24, DType::kF32));
  ExpectMatchesOracle(MakeCase(DocumentsOf(2500, {{2500}}), 640, 2, 3, 1, 40, DType::kBF16));
}

TEST(MobaTest, EveryHeadSize) {
  for (const int64_t dim : {24, 64, 80, 128, 192, 256}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      ExpectMatchesOracle(MakeCase(DocumentsOf(200, {{200}}), 64, 2, 2, 1, dim, dtype));
    }
  }
}

// More candidates than a tile of the gate holds.
TEST(MobaTest, SelectsAmongManyBlocks) {
  const int64_t length = 64 * 150 + 11;
  for (const DType dtype : FloatDtypes()) {
    const MobaCase c = MakeCase(DocumentsOf(length, {{64 * 3 + 5, length}}), 64, 6, 1, 1, 8, dtype);
    Context ctx = OpContext();
    const MobaInputs in = MakeMobaInputs(c);
    const auto plan = MobaPlanOf(c);
    for (const std::string& name : MobaImplementationsFor(ctx, c)) {
      const Tensor selected = ops::MobaSelect(ctx, FromVec(ctx, {length, 1, 8}, dtype, in.q),
                                              FromVec(ctx, {length, 1, 8}, dtype, in.k), *plan,
                                              {.implementation = name});
      std::vector<int32_t> chosen(static_cast<size_t>(selected.numel()));
      CopyToHost(selected, chosen.data());
      ExpectLargestGates(c, in, ChoiceOf(c, chosen), c.Name() + " " + name);
    }
  }
}

// The gradients of the definition itself, so that the oracle's own are no guess.
TEST(MobaTest, GradientsMatchFiniteDifferences) {
  if (OnCuda()) return;  // f64
  const MobaCase c = MakeCase(DocumentsOf(270, {{200, 270}}), 64, 2, 2, 1, 2, DType::kF64);
  Context ctx = OpContext();
  MobaInputs in = MakeMobaInputs(c);
  const MobaRun run = RunMoba(ctx, c, in, "reference");
  const MobaChoice choice = ChoiceOf(c, run.selected);  // held fixed
  const auto loss = [&] {
    return Dot(in.d_out, MobaOracleForward(c.problem, choice, in.q, in.k, in.v).o);
  };
  EXPECT_LT(RelRms(run.dq, NumericGradient(in.q, loss)), 1e-7);
  EXPECT_LT(RelRms(run.dk, NumericGradient(in.k, loss)), 1e-7);
  EXPECT_LT(RelRms(run.dv, NumericGradient(in.v, loss)), 1e-7);
}

struct Dense {
  Vec o, lse;
};
Dense RunDense(Context& ctx, const MobaCase& c, const MobaInputs& in,
               const ops::AttentionPattern& pattern, const std::string& name) {
  const MobaProblem& p = c.problem;
  const ops::BlockList all = ops::BlockList::All(*p.documents);
  const auto mask = ops::BlockMask::Build(pattern, p.kv_heads, p.documents, all, all);
  const Tensor k = FromVec(ctx, {p.tokens(), p.kv_heads, p.dim}, c.dtype, in.k);
  const ops::AttentionResult r =
      ops::AttentionForward(ctx, FromVec(ctx, {p.tokens(), p.heads, p.dim}, c.dtype, in.q),
                            ops::MakeKvView(k, FromVec(ctx, k.shape(), c.dtype, in.v), *mask),
                            *mask, {.scale = p.scale, .implementation = name});
  return {ToVec(r.o), ToVec(r.lse)};
}

TEST(MobaTest, AsManyBlocksAsThereAreIsCausalAttention) {
  Context ctx = OpContext();
  for (const auto& documents : DocumentSets()) {
    for (const int64_t top_k : {6, 1 << 30}) {  // 331 tokens are 6 blocks
      const MobaCase c = MakeCase(documents, 64, top_k, 4, 2, 32, DType::kF32);
      const MobaInputs in = MakeMobaInputs(c);
      for (const std::string& name : MobaImplementationsFor(ctx, c)) {
        const Dense dense = RunDense(ctx, c, in, ops::AttentionPattern::Causal(), name);
        const MobaRun run = RunMoba(ctx, c, in, name);
        EXPECT_LT(RelMax(run.o, dense.o), 3e-6) << c.Name() << name;
        EXPECT_LT(RelMax(run.lse, dense.lse), 1e-6) << c.Name() << name;
      }
    }
  }
}

TEST(MobaTest, OneBlockIsBlockDiagonal) {
  Context ctx = OpContext();
  for (const auto& documents : DocumentSets()) {
    const MobaCase c = MakeCase(documents, 128, 1, 2, 2, 32, DType::kF32);
    const MobaInputs in = MakeMobaInputs(c);
    // One local block of S2 whose stride reaches no other.
    const auto pattern = ops::AttentionPattern::S2({.block_size = 128,
                                                    .local_blocks = 1,
                                                    .stride_blocks = 1 << 20,
                                                    .homogeneous = true,
                                                    .head_offset = 1 << 19});
    for (const std::string& name : MobaImplementationsFor(ctx, c)) {
      const Dense dense = RunDense(ctx, c, in, pattern, name);
      const MobaRun run = RunMoba(ctx, c, in, name);
      EXPECT_LT(RelMax(run.o, dense.o), 1e-6) << c.Name() << name;
      EXPECT_LT(RelMax(run.lse, dense.lse), 1e-6) << c.Name() << name;
    }
  }
}

// Equal keys in all blocks make all gates of a row equal; equal keys in pairs of blocks make the
// last place a tie.
TEST(MobaTest, TiesGoToTheLowerBlock) {
  constexpr int64_t kBlocks = 7, kDim = 16;
  for (const DType dtype : FloatDtypes()) {
    for (const int64_t period : {1, 2}) {
      const MobaCase c =
          MakeCase(DocumentsOf(kBlocks * 64, {{kBlocks * 64}}), 64, 3, 2, 1, kDim, dtype);
      MobaInputs in = MakeMobaInputs(c);
      const auto apart = static_cast<size_t>(64 * kDim * period);
      for (size_t i = apart; i < in.k.size(); ++i) in.k[i] = in.k[i - apart];
      const MobaChoice expected = MobaChoose(c.problem, in.q, in.k);
      Context ctx = OpContext();
      for (const std::string& name : MobaImplementationsFor(ctx, c)) {
        EXPECT_EQ(ChoiceOf(c, RunMoba(ctx, c, in, name).selected), expected)
            << c.Name() << " " << name << " " << period;
      }
    }
  }
}

// A block that holds a NaN must not be passed over in silence.
TEST(MobaTest, NanInABlockReachesItsReaders) {
  for (const DType dtype : FloatDtypes()) {
    const MobaCase c = MakeCase(DocumentsOf(400, {{400}}), 64, 2, 1, 2, 8, dtype);
    MobaInputs in = MakeMobaInputs(c);
    in.k[static_cast<size_t>((70 * 2 + 1) * 8 + 3)] = std::numeric_limits<double>::quiet_NaN();
    Context ctx = OpContext();
    for (const std::string& name : MobaImplementationsFor(ctx, c)) {
      const MobaRun run = RunMoba(ctx, c, in, name);
      for (int64_t t = 0; t < 400; ++t) {
        EXPECT_FALSE(std::isnan(run.o[static_cast<size_t>(t * 2 * 8)]))
            << c.Name() << " " << name << " head 0 " << t;
        EXPECT_EQ(std::isnan(run.o[static_cast<size_t>((t * 2 + 1) * 8)]), t >= 70)
            << c.Name() << " " << name << " head 1 " << t;
      }
    }
  }
}

TEST(MobaTest, SameBitsForAnyNumberOfThreads) {
  if (OnCuda()) return;
  for (const DType dtype : kFloatDtypes) {
    const MobaCase c = MakeCase(DocumentsOf(2300, {{900, 2300}}), 64, 4, 4, 2,
                                dtype == DType::kF64 ? 4 : 24, dtype);
    const MobaInputs in = MakeMobaInputs(c);
    Context one = OpContext(1);
    for (const std::string& name : MobaImplementationsFor(one, c)) {
      const MobaRun want = RunMoba(one, c, in, name);
      for (const int threads : {2, 3}) {
        Context ctx = OpContext(threads);
        const MobaRun run = RunMoba(ctx, c, in, name);
        EXPECT_EQ(run.selected, want.selected) << name << " " << threads;
        EXPECT_EQ(run.o, want.o) << name << " " << threads;
        EXPECT_EQ(run.lse, want.lse) << name << " " << threads;
        EXPECT_EQ(run.dq, want.dq) << name << " " << threads;
        EXPECT_EQ(run.dk, want.dk) << name << " " << threads;
        EXPECT_EQ(run.dv, want.dv) << name << " " << threads;
      }
    }
  }
}

// Neither T x blocks gates nor top_k - 1 partial results: the highest use of memory is that of the
// operands, the results, the lists and a few tiles.
TEST(MobaTest, MemoryIsThatOfOperandsAndLists) {
  constexpr int64_t kTokens = 16384, kHeads = 2, kDim = 8, kBlocks = kTokens / 64, kWidth = 2;
  const MobaCase c =
      MakeCase(DocumentsOf(kTokens, {{kTokens}}), 64, kWidth + 1, kHeads, 1, kDim, DType::kF32);
  const MobaInputs in = MakeMobaInputs(c);
  Context ctx = OpContext(1);
  RunMoba(ctx, c, in, "");
  const auto bytes = [](int64_t elements, size_t size) {
    return static_cast<int64_t>(Allocator::BlockBytes(static_cast<size_t>(elements) * size));
  };
  const int64_t queries = bytes(kTokens * kHeads * kDim, 4);  // each of q, o, d_out, dq
  const int64_t keys = bytes(kTokens * kDim, 4);              // k, v, dk, dv
  const int64_t rows = bytes(kTokens * kHeads, 4);            // lse, delta
  const int64_t entries = bytes(kTokens * kHeads * kWidth, 4);
  const int64_t held =
      4 * queries + 4 * keys + 2 * rows + 2 * entries + bytes(kBlocks * kHeads + 1, 8);
  const int64_t tiles = static_cast<int64_t>(ctx.allocator().peak_bytes()) - held;
  EXPECT_GE(tiles, 0);
  EXPECT_LT(tiles, queries / 2);
}

TEST(MobaTest, RefusesWhatDoesNotFit) {
  Context ctx = OpContext();
  const MobaCase c = MakeCase(DocumentsOf(200, {{200}}), 64, 2, 2, 2, 8, DType::kF32);
  const auto plan = MobaPlanOf(c);
  const Tensor q = ctx.Zeros({200, 4, 8}, DType::kF32), k = ctx.Zeros({200, 2, 8}, DType::kF32);
  const auto message = [&](const std::function<void()>& call) -> std::string {
    try {
      call();
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "no InvalidArgument";
  };
  const auto forward = [&](const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                           const ops::AttentionOptions& options = {}) {
    return message([&] { ops::MobaForward(ctx, q_in, k_in, v_in, *plan, options); });
  };
  const auto expect_names = [](const std::string& got, const std::string& part) {
    EXPECT_NE(got.find(part), std::string::npos) << got;
  };
  expect_names(forward(ctx.Zeros({199, 4, 8}, DType::kF32), k, k), "q is f32[199, 4, 8]");
  expect_names(forward(ctx.Zeros({200, 3, 8}, DType::kF32), k, k), "q is f32[200, 3, 8]");
  expect_names(forward(q, ctx.Zeros({200, 1, 8}, DType::kF32), k), "k is f32[200, 1, 8]");
  expect_names(forward(q, k, ctx.Zeros({200, 2, 8}, DType::kBF16)), "v is bf16[200, 2, 8]");
  expect_names(forward(q, k, k, {.implementation = "magic"}), "magic");
  expect_names(forward(q, k, k, {.implementation = {}, .round_output = true}), "round_output");
  ops::AttentionOptions sigmoid;
  sigmoid.normalization = ops::Normalization::kSigmoid;
  expect_names(forward(q, k, k, sigmoid), "options.normalization is sigmoid");
  expect_names(message([&] {
                 ops::MobaBackward(ctx, q, q, k, k, ctx.Zeros({200, 4}, DType::kF32),
                                   ctx.Zeros({200, 4}, DType::kF32), {}, *plan, sigmoid);
               }),
               "options.normalization is sigmoid");
  expect_names(message([&] {
                 ops::MobaBackward(ctx, q, q, k, k, ctx.Zeros({200, 4}, DType::kF32),
                                   ctx.Zeros({200, 4}, DType::kF32), {}, *plan);
               }),
               "lists are of 0 rows");
  const ops::RoutedLists lists = ops::MobaForward(ctx, q, k, k, *plan).lists;
  const auto backward = [&](const std::function<void(ops::RoutedLists&)>& spoil) {
    ops::RoutedLists changed = lists;
    spoil(changed);
    const Tensor rows = ctx.Zeros({200, 4}, DType::kF32);
    return message([&] { ops::MobaBackward(ctx, q, q, k, k, rows, rows, changed, *plan); });
  };
  EXPECT_EQ(backward([](ops::RoutedLists&) {}), "no InvalidArgument");
  expect_names(backward([](auto& l) { l.selected = {}; }), "lists.selected is undefined");
  expect_names(backward([&](auto& l) {
                 l.selected = ctx.Zeros({4, 199, 1}, DType::kI32);
               }),
               "lists.selected is i32[4, 199, 1]");
  expect_names(backward([&](auto& l) { l.offsets = ctx.Zeros({16}, DType::kI64); }),
               "lists.offsets is i64[16] but must be i64[17]");
  expect_names(backward([&](auto& l) { l.offsets = ctx.Zeros({17}, DType::kI32); }),
               "lists.offsets is i32[17]");
  expect_names(backward([&](auto& l) { l.query_rows = ctx.Zeros({799}, DType::kI32); }),
               "lists.query_rows is i32[799]");
  if (OnCuda()) {
    Context host;
    expect_names(backward([&](auto& l) { l.query_rows = host.Zeros({800}, DType::kI32); }),
                 "lists.query_rows");
  }
  for (const int64_t size : {int64_t{-64}, int64_t{0}, int64_t{96}, (int64_t{1} << 31) + 64,
                             std::numeric_limits<int64_t>::max() - 63}) {
    expect_names(
        message([&] { ops::MobaPlan::Build({.block_size = size}, 2, c.problem.documents); }),
        Str("moba.block_size is ", size));
    expect_names(message([&] { ops::RoutedBlocks::Build(size, c.problem.documents); }),
                 Str("block_size is ", size));
  }
  for (const int64_t top_k : {int64_t{-1}, int64_t{0}, (int64_t{1} << 31) + 1}) {
    expect_names(message([&] { ops::MobaPlan::Build({.top_k = top_k}, 2, c.problem.documents); }),
                 Str("moba.top_k is ", top_k));
  }
  const auto widest = ops::MobaPlan::Build(
      {.block_size = int64_t{1} << 31, .top_k = int64_t{1} << 31}, 2, c.problem.documents);
  EXPECT_EQ(widest->NominalPairs(), 200 * 201 / 2);
}

TEST(MobaTest, NominalPairsCountWholeBlocks) {
  // 331 tokens in blocks of 64: 5 whole ones and 11 tokens.
  const auto pairs = [](int64_t top_k) {
    return MobaPlanOf(MakeCase(DocumentsOf(331, {{331}}), 64, top_k, 1, 1, 8, DType::kF32))
        ->NominalPairs();
  };
  const int64_t own = 5 * (64 * 65 / 2) + 11 * 12 / 2;
  EXPECT_EQ(pairs(1), own);
  EXPECT_EQ(pairs(2), own + 64 * (331 - 64));
  EXPECT_EQ(pairs(100), 331 * 332 / 2);
}

}  // namespace
}  // namespace longspan::test
