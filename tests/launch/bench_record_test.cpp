#include "launch/bench/record.h"

#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "launch/bench/attention_bench.h"
#include "launch/bench/gemm_bench.h"
#include "launch/bench/gpu_peaks.h"
#include "launch/bench/operands.h"
#include "tests/support/numeric.h"

namespace longspan::launch {
namespace {

TEST(BenchTimingTest, MedianAndNinetiethPercentile) {
  const Timing odd = Summarize({5, 1, 3});
  EXPECT_EQ(odd.median_ms, 3);
  EXPECT_EQ(odd.p90_ms, 5);
  EXPECT_EQ(odd.repeats, 3);
  EXPECT_EQ(Summarize({4, 1, 2, 9}).median_ms, 3);
  EXPECT_EQ(Summarize({10, 9, 8, 7, 6, 5, 4, 3, 2, 1}).p90_ms, 9);
  EXPECT_EQ(Summarize({11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1}).p90_ms, 10);
}

TEST(BenchTimingTest, RunsTakeTurnsAfterOneWarmUp) {
  std::string order;
  const auto timings =
      TimeInterleaved({[&] { order += 'a'; }, [&] { order += 'b'; }}, /*seconds=*/0);
  EXPECT_EQ(order, "abababababab");
  ASSERT_EQ(timings.size(), 2u);
  EXPECT_EQ(timings[0].repeats, 5);
  EXPECT_EQ(timings[1].repeats, 5);
}

TEST(BenchRecordTest, FloorIsTheSlowerOfArithmeticAndMemory) {
  BenchRecord r;
  r.timing.median_ms = 8;
  r.flops = 4e9;
  r.bytes = 1e8;
  r.peak_gflops = 1000;  // 4 ms
  r.peak_gbps = 100;     // 1 ms
  EXPECT_DOUBLE_EQ(r.floor_ms(), 4);
  EXPECT_DOUBLE_EQ(r.fraction_of_floor(), 0.5);
  EXPECT_DOUBLE_EQ(r.gflops(), 500);
  r.bytes = 6e8;
  EXPECT_DOUBLE_EQ(r.floor_ms(), 6);
}

TEST(BenchRecordTest, JsonHasNullWhereNothingApplies) {
  BenchRecord r;
  r.op = "gemm";
  r.timing.median_ms = 1;
  r.peak_gflops = r.peak_gbps = 1;
  const auto json = nlohmann::json::parse(ToJsonLine(r));
  EXPECT_TRUE(json.at("visible_fraction").is_null());
  EXPECT_TRUE(json.at("block_fraction").is_null());
  EXPECT_TRUE(json.at("peer").is_null());
  EXPECT_TRUE(json.at("peer_ms_median").is_null());
}

TEST(BenchRecordTest, PeaksFollowTheDtype) {
  const MachinePeaks peaks{.f32_gflops = 100, .bf16_gflops = 300};
  EXPECT_EQ(PeakGflops(peaks, DType::kF32), 100);
  EXPECT_EQ(PeakGflops(peaks, DType::kBF16), 300);
  EXPECT_EQ(PeakGflops(peaks, DType::kF64), 50);
}

TEST(GpuPeaksTest, NamesAreFoundAndNotMistaken) {
  const auto bf16 = [](const char* name) {
    const auto peaks = KnownGpu(name);
    return peaks.has_value() ? peaks->bf16_gflops * 1e-3 : 0;
  };
  EXPECT_NEAR(bf16("NVIDIA H100 80GB HBM3"), 989, 1);
  EXPECT_NEAR(bf16("NVIDIA H100 PCIe"), 756, 1);
  EXPECT_NEAR(bf16("NVIDIA H200"), 989, 1);
  EXPECT_NEAR(bf16("NVIDIA GH200 480GB"), 989, 1);
  EXPECT_NEAR(bf16("NVIDIA H20"), 148, 1);
  EXPECT_NEAR(bf16("NVIDIA A100-SXM4-80GB"), 312, 1);
  EXPECT_NEAR(bf16("NVIDIA A30"), 165, 1);
  EXPECT_NEAR(bf16("NVIDIA L4"), 121, 1);
  EXPECT_NEAR(bf16("NVIDIA L40S"), 362, 1);
  EXPECT_NEAR(bf16("NVIDIA L40"), 181, 1);
  EXPECT_NEAR(bf16("NVIDIA GeForce RTX 4090"), 165, 1);
  EXPECT_NEAR(bf16("NVIDIA GeForce RTX 3090"), 71, 1);
  for (const char* unknown :
       {"NVIDIA RTX A3000", "NVIDIA H1000", "NVIDIA XL4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 with Max-Q Design",
        "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "Emulated GPU", ""}) {
    EXPECT_EQ(bf16(unknown), 0) << unknown;
  }
}

TEST(BenchRecordTest, StepsAloneHaveTokens) {
  BenchRecord r;
  r.timing.median_ms = r.peak_gflops = r.peak_gbps = 1;
  EXPECT_FALSE(nlohmann::json::parse(ToJsonLine(r)).contains("tokens_per_s"));
  r.tokens_per_s = 5;
  const auto json = nlohmann::json::parse(ToJsonLine(r));
  EXPECT_EQ(json.at("tokens_per_s"), 5);
  EXPECT_TRUE(json.at("mfu").is_null());
}

TEST(BenchRecordTest, ReferenceIsTimedOnlyWhenWantedOrAlone) {
  const std::vector<Candidate> all = {{"a", ""}, {"b", "no such unit here"}, {"reference", ""}};
  EXPECT_EQ(ChooseImplementations("x", all, ""), std::vector<std::string>{"a"});
  EXPECT_EQ(ChooseImplementations("x", {{"z", "no"}, {"a", ""}, {"c", ""}}, "best"),
            std::vector<std::string>{"a"});
  EXPECT_EQ(ChooseImplementations("x", all, "reference"), std::vector<std::string>{"reference"});
  const std::vector<Candidate> gpu = {{"mma", ""}, {"reference_cuda", ""}};
  EXPECT_EQ(ChooseImplementations("x", gpu, ""), std::vector<std::string>{"mma"});
  const std::vector<Candidate> few = {{"a", "f64"}, {"reference", ""}};
  EXPECT_EQ(ChooseImplementations("x", few, ""), std::vector<std::string>{"reference"});
  const auto complaint = [&](const std::string& wanted) -> std::string {
    try {
      ChooseImplementations("case_x", all, wanted);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_NE(complaint("b").find("case_x: no such unit here"), std::string::npos) << complaint("b");
  EXPECT_NE(complaint("c").find("a, b, reference"), std::string::npos) << complaint("c");
}

TEST(BenchOperandsTest, DifferenceSeesOneWrongRowAndNan) {
  Context ctx;
  const Tensor a = RandomTensor(ctx, {200, 8}, DType::kF32, 1);
  const Tensor b = RandomTensor(ctx, {200, 8}, DType::kF32, 1);
  EXPECT_EQ(RelativeDifference(a, b), 0);
  for (int i = 0; i < 8; ++i) b.data<float>()[8 * 77 + i] *= -1;
  EXPECT_GT(RelativeDifference(a, b), AllowedDifference(DType::kBF16));
  EXPECT_THROW(RequireAgreement("case_x", "fast", "o", RelativeDifference(a, b), DType::kF32),
               Error);
  b.data<float>()[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(RelativeDifference(a, b), std::numeric_limits<double>::infinity());
  EXPECT_THROW(RequireAgreement("case_x", "fast", "o", RelativeDifference(a, b), DType::kF64),
               Error);
}

TEST(BenchOperandsTest, RandomOperandsAreNormalAndNeverConstant) {
  Context ctx;
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
    const test::Vec x = test::ToVec(RandomTensor(ctx, {100000}, dtype, 7));
    const test::Vec y = test::ToVec(RandomTensor(ctx, {100000}, dtype, 8));
    EXPECT_NEAR(test::Dot(x, x) / 1e5, 1, 0.03) << ToString(dtype);
    EXPECT_NEAR(test::Dot(x, y) / 1e5, 0, 0.03) << ToString(dtype);
  }
}

// Effective FLOPs and bytes by hand for a row of 100 causal tokens: 5050 pairs.
TEST(BenchAttentionTest, CountsWorkOfBothPasses) {
  Context ctx;
  const MachinePeaks peaks{.f32_gflops = 1, .bf16_gflops = 1, .copy_gbps = 1, .threads = 1};
  const auto records = BenchAttention(ctx, {ParseAttentionCase("causal_bf16_T100_Hq4_Hkv2_D16")},
                                      {.implementation = "reference", .seconds = 0}, peaks);
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].pass, "forward");
  EXPECT_EQ(records[0].flops, 4.0 * 5050 * 4 * 16);
  EXPECT_EQ(records[0].bytes, 2.0 * (2 * 100 * 4 * 16 + 2 * 100 * 2 * 16));
  EXPECT_EQ(records[0].visible_fraction, 1);
  EXPECT_EQ(records[0].implementation, "reference");
  EXPECT_GT(records[0].timing.median_ms, 0);
  EXPECT_EQ(records[1].pass, "backward");
  EXPECT_EQ(records[1].flops, 10.0 * 5050 * 4 * 16);
  // q, o, do in bf16, k, v in bf16; dq, dk, dv in f32.
  EXPECT_EQ(records[1].bytes, 2.0 * (3 * 6400 + 2 * 3200) + 4.0 * (6400 + 2 * 3200));
}

TEST(BenchAttentionTest, PassesCanBeChosen) {
  Context ctx;
  const MachinePeaks peaks{.f32_gflops = 1, .bf16_gflops = 1, .copy_gbps = 1, .threads = 1};
  const AttentionCase c = ParseAttentionCase("full_f64_T20_Hq1_Hkv1_D4");
  const auto forward = BenchAttention(ctx, {c}, {.backward = false, .seconds = 0}, peaks);
  ASSERT_EQ(forward.size(), 1u);
  EXPECT_EQ(forward[0].pass, "forward");
  const auto backward = BenchAttention(ctx, {c}, {.forward = false, .seconds = 0}, peaks);
  ASSERT_EQ(backward.size(), 1u);
  EXPECT_EQ(backward[0].pass, "backward");
}

// Cases of one shape share their rounds; a sparse one is compared with the dense one of its kind.
TEST(BenchAttentionTest, GroupsShareRoundsAndCompareWithTheDenseCase) {
  std::vector<AttentionCase> cases;
  for (const char* name :
       {"window_f32_T300_Hq2_Hkv2_D16_W64", "causal_f32_T100_Hq2_Hkv2_D16",
        "causal_f32_T300_Hq2_Hkv2_D16", "s2_f32_T300_Hq2_Hkv2_D16_B16_L2_V2",
        "causal_f32_T300_Hq2_Hkv2_D16_P70", "moba_f32_T300_Hq2_Hkv2_D16_B64_K2"}) {
    cases.push_back(ParseAttentionCase(name));
  }
  const auto groups = GroupByShape(cases);
  ASSERT_EQ(groups.size(), 3u);
  const auto names = [](const std::vector<AttentionCase>& group) {
    std::string text;
    for (const AttentionCase& c : group) text += c.name.substr(0, c.name.find('_')) + " ";
    return text;
  };
  EXPECT_EQ(names(groups[0]), "window causal s2 moba ");
  EXPECT_EQ(groups[1].front().tokens, 100);
  EXPECT_EQ(groups[2].front().document_tokens, 70);

  Context ctx;
  const MachinePeaks peaks{.f32_gflops = 1, .bf16_gflops = 1, .copy_gbps = 1, .threads = 1};
  const auto records =
      BenchAttention(ctx, groups[0], {.implementation = "best", .seconds = 0}, peaks);
  ASSERT_EQ(records.size(), 8u);
  for (size_t i = 0; i < records.size(); ++i) {
    const BenchRecord& r = records[i];
    EXPECT_EQ(r.name, groups[0][i / 2].name);
    EXPECT_EQ(r.pass, i % 2 == 0 ? "forward" : "backward");
    if (i / 2 == 1) {
      EXPECT_FALSE(r.time_fraction.has_value()) << "the dense case itself";
    } else {
      const double dense = records[2 + i % 2].timing.median_ms;
      EXPECT_NEAR(r.time_fraction.value(), r.timing.median_ms / dense, 1e-12) << r.name;
    }
  }
  EXPECT_EQ(records[0].flops, 4.0 * 16 * 2 * (300 * 64 - 64 * 63 / 2));
}

// Work and times of all heads by hand, with a clock on which run number i takes i + 1 ms: those of
// the whole case count once, of one kv head of four four times, of two of four twice.
TEST(BenchAttentionTest, SomeKvHeadsMayStandForAll) {
  Context ctx;
  const MachinePeaks peaks{.f32_gflops = 1, .bf16_gflops = 1, .copy_gbps = 1, .threads = 1};
  std::vector<size_t> measured;  // runs of a measurement
  const BenchOptions options{
      .implementation = "best",
      .timer = [&](Context&, const std::vector<std::function<void()>>& runs, double, int) {
        measured.push_back(runs.size());
        std::vector<Timing> timings;
        for (const auto& run : runs) {
          run();
          const double ms = static_cast<double>(timings.size()) + 1;
          timings.push_back({.median_ms = ms, .p90_ms = ms + 0.5, .repeats = 3});
        }
        return timings;
      }};
  std::vector<AttentionCase> cases;
  for (const char* name :
       {"causal_f32_T500_Hq8_Hkv4_D16", "causal_f32_T500_Hq8_Hkv4_D16_G1",
        "causal_f32_T500_Hq8_Hkv4_D16_G2", "window_f32_T500_Hq8_Hkv4_D16_W64_G2"}) {
    cases.push_back(ParseAttentionCase(name));
  }
  const auto records = BenchAttention(ctx, cases, options, peaks);
  EXPECT_EQ(measured, (std::vector<size_t>{4, 4}));
  ASSERT_EQ(records.size(), 8u);
  constexpr double kCausal = 500.0 * 501 / 2, kWindow = 500.0 * 64 - 64 * 63 / 2;
  constexpr double kQ = 500 * 8 * 16, kKv = 2 * 500 * 4 * 16;  // elements
  const double factor[] = {1, 4, 2, 2};
  for (size_t i = 0; i < 8; ++i) {
    const BenchRecord& r = records[i];
    SCOPED_TRACE(r.name + " " + r.pass);
    const bool backward = i % 2 == 1;
    const double pairs = i / 2 == 3 ? kWindow : kCausal, ms = static_cast<double>(i / 2) + 1;
    EXPECT_EQ(r.pass, backward ? "backward" : "forward");
    EXPECT_EQ(r.flops, (backward ? 10 : 4) * pairs * 8 * 16);
    EXPECT_EQ(r.bytes, backward ? 4 * (4 * kQ + 2 * kKv) : 4 * (2 * kQ + kKv));
    EXPECT_EQ(r.timing.median_ms, factor[i / 2] * ms);
    EXPECT_EQ(r.timing.p90_ms, factor[i / 2] * (ms + 0.5));
    EXPECT_EQ(r.timing.repeats, 3);
    EXPECT_EQ(r.timed_kv_heads, (std::vector<int64_t>{0, 1, 2, 2})[i / 2]);
    EXPECT_EQ(r.visible_fraction, pairs / kCausal);
  }
  EXPECT_EQ(records[6].time_fraction, 8.0);  // twice 4 ms over the 1 ms of the whole causal case
  EXPECT_EQ(nlohmann::json::parse(ToJsonLine(records[2])).at("timed_kv_heads"), 1);
  EXPECT_FALSE(nlohmann::json::parse(ToJsonLine(records[0])).contains("timed_kv_heads"));
  const AttentionCase uneven = ParseAttentionCase("s2_f32_T500_Hq4_Hkv4_D16_B16_L2_V4_G1");
  try {
    BenchAttention(ctx, {uneven}, options, peaks);
    ADD_FAILURE() << "kv heads with other patterns were left out";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("G1 would leave out"), std::string::npos);
  }
}

TEST(BenchGemmTest, CountsWorkOfEveryRole) {
  Context ctx;
  const MachinePeaks peaks{.f32_gflops = 1, .bf16_gflops = 1, .copy_gbps = 1, .threads = 1};
  const BenchOptions options{.implementation = "reference", .seconds = 0};
  const auto run = [&](const char* name) {
    return BenchGemm(ctx, ParseGemmCase(name), options, peaks).at(0);
  };
  EXPECT_EQ(run("gemm_f32_M10_N20_K30").flops, 12000);
  EXPECT_EQ(run("gemm_f32_M10_N20_K30").bytes, 4 * (300 + 600 + 200));
  EXPECT_EQ(run("gemm_f32_M10_N20_K30").pass, "forward");
  EXPECT_EQ(run("gemm_bf16_forward_M10_N20_K30").bytes, 2 * (300 + 600 + 200));
  EXPECT_EQ(run("gemm_bf16_forward_M10_N20_K30").pass, "forward");
  EXPECT_EQ(run("gemm_bf16_dx_M10_N20_K30").pass, "backward");
  // Added to an f32 result: read and written.
  EXPECT_EQ(run("gemm_bf16_dw_M10_N20_K30").bytes, 2 * (300 + 600) + 2 * 4 * 200);
  EXPECT_TRUE(BenchGemm(ctx, ParseGemmCase("gemm_f32_dw_M1_N2_K3"),
                        {.backward = false, .seconds = 0}, peaks)
                  .empty());
}

}  // namespace
}  // namespace longspan::launch
