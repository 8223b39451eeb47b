#include "launch/bench/timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "ops/core/check.h"

namespace longspan::launch {
namespace {

constexpr int kLeastRounds = 5;
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

std::vector<Timing> TimeInterleaved(const std::vector<std::function<void()>>& runs,
                                    double seconds) {
  for (const auto& run : runs) run();
  std::vector<std::vector<double>> times(runs.size());
  const double budget = seconds * static_cast<double>(runs.size());
  const auto start = Clock::now();
  for (int round = 0; round < kLeastRounds || SecondsSince(start) < budget; ++round) {
    for (size_t i = 0; i < runs.size(); ++i) {
      const auto begin = Clock::now();
      runs[i]();
      times[i].push_back(SecondsSince(begin) * 1e3);
    }
  }
  std::vector<Timing> timings;
  for (auto& t : times) timings.push_back(Summarize(std::move(t)));
  return timings;
}

}  // namespace longspan::launch
