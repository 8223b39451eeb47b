#include "launch/bench/gpu_peaks.h"

#include <algorithm>
#include <cctype>
#include <functional>

#include "launch/bench/operands.h"
#include "ops/core/cuda/backend.h"
#include "ops/gemm/gemm.h"

namespace longspan::launch {
namespace {

// The first entry whose text occurs in the name counts, so special versions stand before the plain
// one. GFLOP/s of the makers' data sheets, without sparsity.
struct Entry {
  const char* text;
  GpuPeaks peaks;
};
constexpr Entry kTable[] = {
    {"GB200", {2500e3, 80e3}},
    {"B200", {2250e3, 75e3}},
    {"GH200", {989.4e3, 66.9e3}},
    {"H200 NVL", {835.5e3, 60e3}},
    {"H200", {989.4e3, 66.9e3}},
    {"H100 PCIe", {756e3, 51.2e3}},
    {"H100 NVL", {835.5e3, 60e3}},
    {"H100", {989.4e3, 66.9e3}},
    {"H800 PCIe", {756e3, 51.2e3}},
    {"H800", {989.4e3, 66.9e3}},
    {"H20", {148e3, 44e3}},
    {"A100-SXM4-80GB", {312e3, 19.5e3}},
    {"A100 80GB PCIe", {312e3, 19.5e3}},
    {"A100", {312e3, 19.5e3}},
    {"A800", {312e3, 19.5e3}},
    {"A30", {165e3, 10.3e3}},
    {"A40", {149.7e3, 37.4e3}},
    {"RTX A6000", {154.8e3, 38.7e3}},
    {"L40S", {362e3, 91.6e3}},
    {"L40", {181e3, 90.5e3}},
    {"L4", {121e3, 30.3e3}},
    {"RTX 4090", {165.2e3, 82.6e3}},
    {"RTX 3090", {71e3, 35.6e3}},
};

// Milliseconds on the device of the fastest of some runs.
double BestMilliseconds(Context& ctx, int runs, const std::function<void()>& run) {
  const auto begin = cuda::MakeMark(ctx.cuda()), end = cuda::MakeMark(ctx.cuda());
  double best = 0;
  for (int i = 0; i < runs; ++i) {
    begin->Record();
    run();
    end->Record();
    end->Wait();
    const double milliseconds = end->MillisecondsSince(*begin);
    best = i == 0 ? milliseconds : std::min(best, milliseconds);
  }
  return best;
}

constexpr int kRuns = 5;

// Parts of a GPU, and versions of a model in the table that have rates of their own.
constexpr const char* kNotInTable[] = {" MIG ", "Laptop", "Max-Q", "4090 D", "3090 Ti"};

}  // namespace

std::optional<GpuPeaks> KnownGpu(const std::string& name) {
  for (const char* text : kNotInTable) {
    if (name.find(text) != std::string::npos) return std::nullopt;
  }
  for (const Entry& entry : kTable) {
    const size_t at = name.find(entry.text);
    if (at == std::string::npos) continue;
    // "L4" is not to be found in "L40", nor "A30" in "A3000".
    const size_t end = at + std::string(entry.text).size();
    if (end < name.size() && std::isalnum(static_cast<unsigned char>(name[end]))) continue;
    if (at > 0 && std::isalnum(static_cast<unsigned char>(name[at - 1]))) continue;
    return entry.peaks;
  }
  return std::nullopt;
}

double MeasureGemmGflops(Context& ctx, DType dtype) {
  constexpr int64_t kLargest = 8192;
  constexpr double kLongEnough = 5;  // ms
  double best = 0;
  for (int64_t n = 256; n <= kLargest; n *= 2) {
    const Tensor a = RandomTensor(ctx, {n, n}, dtype, 1), b = RandomTensor(ctx, {n, n}, dtype, 2);
    Tensor c = ctx.Empty({n, n}, dtype);
    const auto product = [&] { ops::Gemm(ctx, a, false, b, true, c, {}); };
    // The first product of a size also chooses its algorithm, on the host.
    product();
    cuda::Synchronize(ctx.cuda());
    double milliseconds = BestMilliseconds(ctx, 1, product);
    if (milliseconds < kLongEnough) milliseconds = BestMilliseconds(ctx, kRuns, product);
    if (milliseconds <= 0) continue;
    const double cube = static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n);
    best = std::max(best, 2 * cube / milliseconds * 1e-6);
    if (milliseconds >= kLongEnough) break;
  }
  return best;
}

MachinePeaks MeasureGpuPeaks(Context& ctx) {
  MachinePeaks peaks;
  peaks.device = "cuda";
  peaks.name = cuda::FactsOf(ctx.device().index).name;
  peaks.threads = ctx.threads();
  peaks.f32_set = peaks.bf16_set = "gemm";
  peaks.bf16_gflops = MeasureGemmGflops(ctx, DType::kBF16);
  peaks.f32_gflops = MeasureGemmGflops(ctx, DType::kF32);
  constexpr int64_t kBytes = int64_t{256} << 20;
  const Tensor from = ctx.Zeros({kBytes}, DType::kU8), to = ctx.Zeros({kBytes}, DType::kU8);
  const double milliseconds = BestMilliseconds(
      ctx, kRuns, [&] { cuda::CopyOnDevice(ctx.cuda(), to.raw(), from.raw(), from.bytes()); });
  peaks.copy_gbps = 2.0 * kBytes / milliseconds * 1e-6;
  return peaks;
}

}  // namespace longspan::launch
