#include "data/mixture.h"

#include <cmath>

#include "ops/core/check.h"

namespace longspan::data {
namespace {

// floor(n share / 2^32 + 1/2). Exact, so that it grows by 0 or 1 from n to n + 1.
int64_t TakenOfFirst(int64_t n, uint64_t share) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(n) * share + (uint64_t{1} << 31);
  return static_cast<int64_t>(product >> 32);
}

}  // namespace

Mixture::Mixture(const std::vector<double>& weights) {
  double rest = 0;
  for (size_t k = 0; k < weights.size(); ++k) {
    if (!(weights[k] > 0) || !std::isfinite(weights[k])) {
      throw InvalidArgument(Str("weight ", weights[k], " of data source ", k,
                                " must be a positive number; remove the source to leave it out"));
    }
    rest += weights[k];
  }
  LONGSPAN_CHECK(!weights.empty()) << "a mixture needs at least one source";
  for (size_t k = 0; k + 1 < weights.size(); ++k) {
    const double share = std::fmin(weights[k] / rest, 1.0);
    shares_.push_back(static_cast<uint64_t>(std::llround(std::ldexp(share, 32))));
    rest -= weights[k];
  }
}

Mixture::Place Mixture::Find(int64_t sample) const {
  LONGSPAN_CHECK(sample >= 0) << "sample " << sample;
  int64_t index = sample;
  for (size_t k = 0; k < shares_.size(); ++k) {
    const int64_t taken = TakenOfFirst(index, shares_[k]);
    if (TakenOfFirst(index + 1, shares_[k]) > taken) return {static_cast<int64_t>(k), taken};
    index -= taken;
  }
  return {static_cast<int64_t>(shares_.size()), index};
}

}  // namespace longspan::data
