#include "ops/core/machine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "ops/core/cpu/amx.h"
#include "ops/core/cpu/peak_kernels.h"
#include "ops/core/parallel_for.h"

namespace longspan {
namespace {

using Clock = std::chrono::steady_clock;
double Seconds(Clock::time_point since) {
  return std::chrono::duration<double>(Clock::now() - since).count();
}

// Eight independent chains that the compiler vectorises for the baseline instruction set.
float PortableFmaLoop(long iterations) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = static_cast<float>(i);
  for (long n = 0; n < iterations; ++n) {
    for (int i = 0; i < 64; ++i) a[i] = a[i] * 0.999f + 1e-3f;
  }
  float sum = 0;
  for (float v : a) sum += v;
  return sum;
}

// Runs `loop` on all threads at once for `seconds`. The sum over threads of each one's best rate,
// in GFLOP/s: rounds in which a thread had to share its core with other processes do not count.
double BestRate(Context& ctx, double seconds, double flops_per_iteration, float (*loop)(long)) {
  constexpr long kIterations = 50000;
  const size_t threads = static_cast<size_t>(ctx.threads());
  std::vector<float> sink(threads);
  std::vector<double> best(threads);
  ParallelFor(ctx, ctx.threads(), [&](int64_t i, int) {
    const size_t t = static_cast<size_t>(i);
    const auto start = Clock::now();
    while (Seconds(start) < seconds) {
      const auto round = Clock::now();
      sink[t] += loop(kIterations);
      best[t] = std::max(best[t], kIterations * flops_per_iteration / Seconds(round));
    }
  });
  double sum = 0;
  for (double rate : best) sum += rate;
  return sum * 1e-9;
}

double CopyRate(Context& ctx, double seconds) {
  constexpr int64_t kBytes = int64_t{64} << 20;  // out of any cache of a core
  Tensor a = ctx.Zeros({kBytes}, DType::kU8), b = ctx.Zeros({kBytes}, DType::kU8);
  double best = 0;
  const auto start = Clock::now();
  while (Seconds(start) < seconds) {
    const auto round = Clock::now();
    ParallelRanges(ctx, kBytes, kBytes / (4 * ctx.threads()), [&](int64_t begin, int64_t end) {
      std::memcpy(b.raw() + begin, a.raw() + begin, static_cast<size_t>(end - begin));
    });
    best = std::max(best, 2.0 * kBytes / Seconds(round));
  }
  return best * 1e-9;
}

}  // namespace

MachinePeaks MeasurePeaks(Context& ctx, double seconds) {
  MachinePeaks peaks;
  peaks.threads = ctx.threads();
  peaks.f32_set = peaks.bf16_set = "portable";
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    peaks.f32_set = "avx512";
    peaks.f32_gflops = BestRate(ctx, seconds, 24 * 16 * 2, avx512::FmaLoop);
  }
#endif
  if (peaks.f32_gflops == 0) peaks.f32_gflops = BestRate(ctx, seconds, 64 * 2, PortableFmaLoop);
  peaks.bf16_gflops = peaks.f32_gflops;
  peaks.bf16_set = peaks.f32_set;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) {
    peaks.bf16_set = "avx512_bf16";
    peaks.bf16_gflops = BestRate(ctx, seconds, 24 * 32 * 2, avx512_bf16::DotLoop);
  }
  if (AmxUsable()) {
    peaks.bf16_set = "amx_bf16";
    peaks.bf16_gflops = BestRate(ctx, seconds, 4 * 16 * 16 * 32 * 2, amx::DotLoop);
  }
#endif
  peaks.copy_gbps = CopyRate(ctx, seconds);
  return peaks;
}

}  // namespace longspan
