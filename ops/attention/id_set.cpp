#include "ops/attention/id_set.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace longspan::ops {
namespace {

// x with a * x == gcd(a, m) modulo m.
int64_t InverseModulo(int64_t a, int64_t m) {
  int64_t r0 = a, r1 = m, x0 = 1, x1 = 0;
  while (r1 != 0) {
    const int64_t q = r0 / r1;
    r0 = std::exchange(r1, r0 - q * r1);
    x0 = std::exchange(x1, x0 - q * x1);
  }
  return x0;
}

}  // namespace

IdRun Intersect(const IdRun& a, const IdRun& b) {
  const int64_t low = std::max(a.first, b.first), high = std::min(a.last(), b.last());
  if (a.count <= 0 || b.count <= 0 || low > high) return {};
  int64_t first, step;
  if (b.step == 1 || a.step == 1) {  // the usual case without the Chinese remainder theorem
    const IdRun& coarse = b.step == 1 ? a : b;
    step = coarse.step;
    first = coarse.first + (low - coarse.first + step - 1) / step * step;
  } else {
    const int64_t g = std::gcd(a.step, b.step);
    if ((b.first - a.first) % g != 0) return {};
    step = a.step / g * b.step;
    const int64_t m = b.step / g;
    const int64_t t = (b.first - a.first) / g % m * (InverseModulo(a.step / g, m) % m) % m;
    first = a.first + t * a.step;  // a common element less than one step away from a.first
    if (first < low) first += (low - first + step - 1) / step * step;
  }
  if (first > high) return {};
  const int64_t count = (high - first) / step + 1;
  return {first, count, count == 1 ? 1 : step};
}

IdSet::IdSet(std::vector<int32_t> ids) {
  std::sort(ids.begin(), ids.end());
  for (size_t i = 0; i < ids.size();) {
    size_t end = i + 1;
    const int64_t step = end < ids.size() ? ids[end] - ids[i] : 1;
    while (end < ids.size() && ids[end] - ids[end - 1] == step) ++end;
    // Two elements at a distance make a poor run when the next ones are contiguous.
    if (end - i == 2 && step > 1) end = i + 1;
    const int64_t count = static_cast<int64_t>(end - i);
    runs_.push_back({ids[i], count, count == 1 ? 1 : step});
    i = end;
  }
}

size_t IdSet::FirstReaching(int64_t id) const {
  const auto it = std::lower_bound(runs_.begin(), runs_.end(), id,
                                   [](const IdRun& run, int64_t x) { return run.last() < x; });
  return static_cast<size_t>(it - runs_.begin());
}

}  // namespace longspan::ops
