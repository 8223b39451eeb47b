#include "ops/gemm/gemm.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <set>
#include <string>

#include "ops/gemm/gemm_tiles.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

struct Case {
  int64_t m, n, k;
};

// op(A) op(B) (+ C) by the definition, in f64.
Vec Reference(const Case& s, const Vec& a, bool ta, const Vec& b, bool tb, const Vec& c) {
  Vec out = c;
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < s.k; ++p) {
        sum += a[static_cast<size_t>(ta ? p * s.m + i : i * s.k + p)] *
               b[static_cast<size_t>(tb ? j * s.k + p : p * s.n + j)];
      }
      out[static_cast<size_t>(i * s.n + j)] += sum;
    }
  }
  return out;
}

// The entries of the table that run on the device of the tests.
std::vector<ops::GemmImplementation> Implementations() {
  std::vector<ops::GemmImplementation> here;
  for (const auto& entry : ops::GemmImplementations()) {
    if (entry.device == TestDevice().kind) here.push_back(entry);
  }
  return here;
}

// One product in all four transpositions, overwriting and accumulating, against the definition.
void CheckProduct(const std::string& name, const Case& s, DType operands, DType result) {
  Context ctx = OpContext();
  const Vec a = Normal(s.m * s.k, 1, operands), b = Normal(s.k * s.n, 2, operands);
  const Vec c = Normal(s.m * s.n, 3, result);
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      for (const bool accumulate : {false, true}) {
        const Tensor a_tensor = FromVec(ctx, ta ? Shape{s.k, s.m} : Shape{s.m, s.k}, operands, a);
        const Tensor b_tensor = FromVec(ctx, tb ? Shape{s.n, s.k} : Shape{s.k, s.n}, operands, b);
        Tensor c_tensor =
            accumulate ? FromVec(ctx, {s.m, s.n}, result, c) : ctx.Empty({s.m, s.n}, result);
        const std::string ran = ops::Gemm(ctx, a_tensor, ta, b_tensor, tb, c_tensor,
                                          {.accumulate = accumulate, .implementation = name});
        EXPECT_EQ(ran, name);
        const Vec expected = Reference(s, a, ta, b, tb, accumulate ? c : Vec(c.size()));
        EXPECT_LE(RelRms(ToVec(c_tensor), expected), Bound(result, expected))
            << name << " " << s.m << "x" << s.n << "x" << s.k << " " << ToString(operands) << "->"
            << ToString(result) << " transposed " << ta << tb << " accumulate " << accumulate;
      }
    }
  }
}

TEST(GemmTest, EveryImplementationMatchesTheDefinition) {
  std::set<std::string> ran;
  for (const auto& entry : Implementations()) {
    for (const auto& [operands, result] : {std::pair{DType::kF32, DType::kF32},
                                           {DType::kBF16, DType::kF32},
                                           {DType::kBF16, DType::kBF16},
                                           {DType::kF64, DType::kF64}}) {
      if (OnCuda() && operands == DType::kF64) continue;
      if (!entry.rejects({operands, result}).empty()) {
        Context ctx = OpContext();
        const Tensor a = FromVec(ctx, {1, 1}, operands, {2});
        Tensor c = FromVec(ctx, {1, 1}, result, {5});
        EXPECT_THROW(ops::Gemm(ctx, a, false, a, false, c, {.implementation = entry.name}),
                     InvalidArgument);
        EXPECT_EQ(ToVec(c), Vec{5});
        continue;
      }
      ran.insert(Str(entry.name, " ", ToString(operands)));
      // Odd sizes below and above the tiles of 64, 128 and 256; so many rows of tiles that B is
      // packed once for all; sums of several slices of 512.
      for (const Case& s : {Case{1, 1, 1},
                            {1, 130, 7},
                            {129, 1, 33},
                            {33, 7, 1},
                            {7, 33, 130},
                            {65, 127, 63},
                            {130, 129, 128},
                            {300, 70, 17},
                            {66, 530, 129},
                            {1100, 530, 17},
                            {70, 90, 1290}}) {
        CheckProduct(entry.name, s, operands, result);
      }
    }
  }
  const std::vector<std::string> cpu = {"onednn f32", "onednn_widened bf16", "reference f32",
                                        "reference bf16", "reference f64"};
  const std::vector<std::string> gpu = {"cublaslt f32", "cublaslt bf16"};
  for (const std::string& name : OnCuda() ? gpu : cpu) EXPECT_TRUE(ran.contains(name)) << name;
  if (OnCuda()) return;
#if defined(__x86_64__)
  const bool limited =
      std::getenv("DNNL_MAX_CPU_ISA") != nullptr || std::getenv("ONEDNN_MAX_CPU_ISA") != nullptr;
  if (__builtin_cpu_supports("avx512bf16") && !limited) {
    EXPECT_TRUE(ran.contains("onednn bf16")) << "the fast path of this processor did not run";
  }
#endif
}

TEST(GemmTest, EverySizeUpTo130) {
  for (int64_t i = 1; i <= 130; i += 5) {
    const Case s{i, 131 - i, 1 + i * 37 % 130};
    for (const auto& entry : Implementations()) {
      for (const DType dtype : FloatDtypes()) {
        if (entry.rejects({dtype, dtype}).empty()) CheckProduct(entry.name, s, dtype, dtype);
      }
    }
  }
}

TEST(GemmTest, SameBitsForAnyThreads) {
  for (const auto& entry : Implementations()) {
    for (const DType dtype : FloatDtypes()) {
      if (!entry.rejects({dtype, dtype}).empty()) continue;
      // A long sum with a small result is where a library splits the sum over its threads.
      for (const Case& s : {Case{70, 90, 3001}, {515, 259, 67}}) {
        ExpectSameBitsForAnyThreads([&](Context& ctx) -> std::vector<Tensor> {
          const Tensor a = FromVec(ctx, {s.k, s.m}, dtype, Normal(s.m * s.k, 1, dtype));
          const Tensor b = FromVec(ctx, {s.k, s.n}, dtype, Normal(s.n * s.k, 2, dtype));
          Tensor c = FromVec(ctx, {s.m, s.n}, AccumulatorOf(dtype), Normal(s.m * s.n, 3));
          ops::Gemm(ctx, a, true, b, false, c, {.accumulate = true, .implementation = entry.name});
          const Tensor x = FromVec(ctx, {1100, s.m}, dtype, Normal(1100 * s.m, 4, dtype));
          const Tensor w = FromVec(ctx, {s.n, s.m}, dtype, Normal(s.n * s.m, 5, dtype));
          Tensor y = ctx.Empty({1100, s.n}, dtype);
          ops::Gemm(ctx, x, false, w, true, y, {.implementation = entry.name});
          return {c, y};
        });
      }
    }
  }
}

TEST(GemmTest, EmptySizes) {
  Context ctx = OpContext();
  for (const DType dtype : FloatDtypes()) {
    Tensor none = ctx.Empty({0, 5}, dtype);
    ops::Gemm(ctx, ctx.Empty({0, 3}, dtype), false, ctx.Zeros({3, 5}, dtype), false, none);
    Tensor c = FromVec(ctx, {2, 2}, dtype, {1, 2, 3, 4});
    const Tensor left = ctx.Empty({2, 0}, dtype), right = ctx.Empty({0, 2}, dtype);
    ops::Gemm(ctx, left, false, right, false, c, {.accumulate = true});
    EXPECT_EQ(ToVec(c), (Vec{1, 2, 3, 4}));
    ops::Gemm(ctx, left, false, right, false, c);
    EXPECT_EQ(ToVec(c), (Vec{0, 0, 0, 0}));
  }
}

TEST(GemmTest, RefusesWhatDoesNotFit) {
  Context ctx = OpContext();
  const Tensor a = ctx.Zeros({2, 3}, DType::kF32), b = ctx.Zeros({3, 4}, DType::kF32);
  Tensor c = ctx.Zeros({2, 4}, DType::kF32), half = ctx.Zeros({2, 4}, DType::kBF16);
  EXPECT_THROW(ops::Gemm(ctx, a, true, b, false, c), InvalidArgument);
  EXPECT_THROW(ops::Gemm(ctx, a, false, b, false, half), InvalidArgument);
  EXPECT_THROW(ops::Gemm(ctx, a, false, ctx.Zeros({3, 4}, DType::kF64), false, c), InvalidArgument);
  EXPECT_THROW(ops::Gemm(ctx, a, false, b, false, c, {.implementation = "mkl"}), InvalidArgument);
}

TEST(GemmTest, ImplementationsOfOtherDevicesAreRefused) {
  Context ctx = OpContext();
  const Tensor a = ctx.Zeros({2, 2}, DType::kF32);
  Tensor c = ctx.Zeros({2, 2}, DType::kF32);
  for (const auto& entry : ops::GemmImplementations()) {
    if (entry.device == TestDevice().kind) continue;
    try {
      ops::Gemm(ctx, a, false, a, false, c, {.implementation = entry.name});
      ADD_FAILURE() << entry.name << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(
          std::string(e.what()).find(Str(entry.name, " does not run on ", ToString(TestDevice()))),
          std::string::npos)
          << e.what();
    }
  }
  if (!OnCuda()) return;
  const Tensor wide = ctx.Zeros({2, 2}, DType::kF64);
  Tensor wide_c = ctx.Zeros({2, 2}, DType::kF64);
  EXPECT_THROW(ops::Gemm(ctx, wide, false, wide, false, wide_c), Unsupported);
}

// A plan made for aligned operands must not serve views that are not, nor the other way round; and
// accumulating must not serve overwriting.
TEST(GemmTest, ViewsAtAnyAlignment) {
  const Case s{9, 24, 40};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Context ctx = OpContext();
    const Vec a = Normal(s.m * s.k, 1, dtype), b = Normal(s.k * s.n, 2, dtype);
    const Vec c = Normal(s.m * s.n, 3);
    for (int which = 0; which < 8; ++which) {
      for (const bool accumulate : {false, true}) {
        const auto make = [&](int bit, Shape shape, DType t, const Vec& values) {
          return kAlignments[which >> bit & 1](ctx, shape, t, values);
        };
        Tensor out = make(2, {s.m, s.n}, DType::kF32, c);
        ops::Gemm(ctx, make(0, {s.m, s.k}, dtype, a), false, make(1, {s.n, s.k}, dtype, b), true,
                  out, {.accumulate = accumulate});
        const Vec expected = Reference(s, a, false, b, true, accumulate ? c : Vec(c.size()));
        EXPECT_LE(RelRms(ToVec(out), expected), 1e-6) << which << accumulate;
      }
    }
  }
}

// Gradients of micro-batches add up in f32 whatever the operands are.
TEST(GemmTest, AccumulatesManyTimes) {
  Context ctx = OpContext();
  const Case s{5, 7, 3};
  Vec expected(s.m * s.n);
  Tensor c = ctx.Zeros({s.m, s.n}, DType::kF32);
  for (uint64_t step = 0; step < 20; ++step) {
    const Vec a = Normal(s.m * s.k, 10 + step, DType::kBF16);
    const Vec b = Normal(s.k * s.n, 50 + step, DType::kBF16);
    ops::Gemm(ctx, FromVec(ctx, {s.k, s.m}, DType::kBF16, a), true,
              FromVec(ctx, {s.k, s.n}, DType::kBF16, b), false, c, {.accumulate = true});
    expected = Reference(s, a, true, b, false, expected);
  }
  EXPECT_LE(RelRms(ToVec(c), expected), 1e-6);
}

TEST(GemmTest, NotFiniteStaysVisible) {
  for (const auto& entry : Implementations()) {
    if (!entry.rejects({DType::kF32, DType::kF32}).empty()) continue;
    Context ctx = OpContext();
    Vec a = Normal(65 * 33, 1);
    a[40] = std::numeric_limits<double>::quiet_NaN();
    Tensor c = ctx.Empty({65, 7}, DType::kF32);
    ops::Gemm(ctx, FromVec(ctx, {65, 33}, DType::kF32, a), false,
              FromVec(ctx, {33, 7}, DType::kF32, Normal(33 * 7, 2)), false, c,
              {.implementation = entry.name});
    const Vec out = ToVec(c);
    for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(std::isnan(out[i]), i / 7 == 1) << i;
  }
}

TEST(GemmTest, TilesCoverTheResultAndFeedSeveralThreads) {
  const auto tiles = [](int64_t m, int64_t n, const ops::internal::GemmTiling& t) {
    return ((m + t.rows - 1) / t.rows) * ((n + t.columns - 1) / t.columns);
  };
  for (const Case& s :
       {Case{256, 256, 8192}, {8192, 256, 256}, {4096, 11008, 4096}, {320, 256, 128}}) {
    const auto t = ops::internal::ChooseTiling(s.m, s.n, s.k, 256, 512);
    EXPECT_LE(t.rows, 256);
    EXPECT_LE(t.columns, 512);
    EXPECT_GE(tiles(s.m, s.n, t), s.m * s.n * s.k > (int64_t{1} << 26) ? 16 : 1);
  }
}

// Run by the ctest entry gemm_test_without_bf16, which hides the processor's bf16 from oneDNN.
TEST(GemmTest, DISABLED_WidensWhereOneDnnHasNoBf16) {
  Context ctx = OpContext();
  const Vec a = Normal(33 * 65, 1, DType::kBF16), b = Normal(65 * 9, 2, DType::kBF16);
  Tensor c = ctx.Empty({33, 9}, DType::kBF16);
  const std::string ran = ops::Gemm(ctx, FromVec(ctx, {33, 65}, DType::kBF16, a), false,
                                    FromVec(ctx, {65, 9}, DType::kBF16, b), false, c);
  EXPECT_EQ(ran, "onednn_widened");
  const Vec expected = Reference({33, 9, 65}, a, false, b, false, Vec(33 * 9));
  EXPECT_LE(RelRms(ToVec(c), expected), Bound(DType::kBF16, expected));
}

}  // namespace
}  // namespace longspan::test
