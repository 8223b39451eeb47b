#include "trainer/straggler.h"

#include <algorithm>

#include "ops/core/check.h"

namespace longspan::trainer {
namespace {

// Median of ascending values without the one at `left_out`.
double MedianWithout(const std::vector<double>& sorted, size_t left_out) {
  const auto at = [&](size_t i) { return sorted[i < left_out ? i : i + 1]; };
  const size_t n = sorted.size() - 1;
  return n % 2 == 1 ? at(n / 2) : (at(n / 2 - 1) + at(n / 2)) / 2;
}

}  // namespace

std::vector<Straggler> StragglerWatch::Step(std::span<const double> own_s) {
  if (slow_steps_.empty()) slow_steps_.resize(own_s.size());
  LONGSPAN_CHECK(slow_steps_.size() == own_s.size())
      << "StragglerWatch: " << own_s.size() << " ranks after " << slow_steps_.size();
  std::vector<double> sorted;
  for (const double seconds : own_s) {
    if (seconds >= 0) sorted.push_back(seconds);
  }
  std::ranges::sort(sorted);
  std::vector<Straggler> found;
  for (size_t r = 0; r < own_s.size() && sorted.size() > 1; ++r) {
    if (own_s[r] < 0) continue;
    const auto place = std::ranges::lower_bound(sorted, own_s[r]) - sorted.begin();
    const double median = MedianWithout(sorted, static_cast<size_t>(place));
    const bool slow = own_s[r] > kSlower * median && own_s[r] > median + kLeastSeconds;
    slow_steps_[r] = slow ? slow_steps_[r] + 1 : 0;
    if (slow_steps_[r] == kSteps) found.push_back({static_cast<int>(r), own_s[r], median});
  }
  return found;
}

}  // namespace longspan::trainer
