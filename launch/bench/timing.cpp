#include "launch/bench/timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "ops/core/check.h"
#include "ops/core/cuda/backend.h"

namespace longspan::launch {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Timing Summarize(std::vector<double> milliseconds) {
  LONGSPAN_CHECK(!milliseconds.empty()) << "Summarize: no times";
  std::sort(milliseconds.begin(), milliseconds.end());
  const size_t n = milliseconds.size();
  const auto p90 = static_cast<size_t>(std::ceil(0.9 * static_cast<double>(n))) - 1;
  return {.median_ms = (milliseconds[(n - 1) / 2] + milliseconds[n / 2]) / 2,
          .p90_ms = milliseconds[p90],
          .repeats = static_cast<int>(n)};
}

namespace {

// Times rounds of `runs` with once(i), which returns milliseconds.
std::vector<Timing> TimeRounds(size_t runs, double seconds, int least,
                               const std::function<double(size_t run)>& once) {
  std::vector<std::vector<double>> times(runs);
  const double budget = seconds * static_cast<double>(runs);
  const auto start = Clock::now();
  for (int round = 0; round < least || SecondsSince(start) < budget; ++round) {
    for (size_t i = 0; i < runs; ++i) times[i].push_back(once(i));
  }
  std::vector<Timing> timings;
  for (auto& t : times) timings.push_back(Summarize(std::move(t)));
  return timings;
}

}  // namespace

std::vector<Timing> TimeInterleaved(const std::vector<std::function<void()>>& runs, double seconds,
                                    int least) {
  for (const auto& run : runs) run();
  return TimeRounds(runs.size(), seconds, least, [&](size_t i) {
    const auto begin = Clock::now();
    runs[i]();
    return SecondsSince(begin) * 1e3;
  });
}

std::vector<Timing> TimeInterleaved(Context& ctx, const std::vector<std::function<void()>>& runs,
                                    double seconds, int least) {
  if (ctx.device().kind == DeviceKind::kCpu) return TimeInterleaved(runs, seconds, least);
  constexpr double kShort = 1;  // ms
  const auto begin = cuda::MakeMark(ctx.cuda()), end = cuda::MakeMark(ctx.cuda());
  const Tensor other = ctx.Empty({4 * cuda::FactsOf(ctx.device().index).l2_bytes}, DType::kU8);
  std::vector<double> last(runs.size());
  const auto once = [&](size_t i) {
    // This also gives the host time to issue the run before the device gets there.
    if (last[i] < kShort) ctx.SetZero(other);
    begin->Record();
    runs[i]();
    end->Record();
    end->Wait();
    return last[i] = end->MillisecondsSince(*begin);
  };
  // The first run may set things up on the host; the second says how long one takes.
  for (int warm_up = 0; warm_up < 2; ++warm_up) {
    for (size_t i = 0; i < runs.size(); ++i) once(i);
  }
  return TimeRounds(runs.size(), seconds, least, once);
}

}  // namespace longspan::launch
