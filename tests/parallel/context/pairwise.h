#pragma once
#include <algorithm>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "ops/core/rng.h"

namespace longspan::test {

// A case of a product: one value of each dimension.
using Choice = std::vector<int>;

// Cases of the product of `sizes` in which every two values of two dimensions meet. Greedy: of some
// drawn at random the one with most pairs that no case has yet.
inline std::vector<Choice> AllPairs(const std::vector<int>& sizes, uint64_t seed) {
  using Pair = std::tuple<size_t, int, size_t, int>;
  std::set<Pair> open;
  for (size_t a = 0; a < sizes.size(); ++a) {
    for (size_t b = a + 1; b < sizes.size(); ++b) {
      for (int x = 0; x < sizes[a]; ++x) {
        for (int y = 0; y < sizes[b]; ++y) open.insert({a, x, b, y});
      }
    }
  }
  const Philox rng(seed, StreamOf("all pairs"));
  uint64_t draws = 0;
  const auto pairs_of = [](const Choice& c, auto&& visit) {
    for (size_t a = 0; a < c.size(); ++a) {
      for (size_t b = a + 1; b < c.size(); ++b) visit(Pair{a, c[a], b, c[b]});
    }
  };
  std::vector<Choice> cases;
  while (!open.empty()) {
    Choice best;
    int most = 0;
    for (int candidate = 0; candidate < 40; ++candidate) {
      Choice c;
      for (const int n : sizes) {
        c.push_back(static_cast<int>(rng.Below(draws++, static_cast<uint64_t>(n))));
      }
      const auto [a, x, b, y] = *open.begin();  // every candidate covers at least this one
      c[a] = x, c[b] = y;
      int covered = 0;
      pairs_of(c, [&](const Pair& p) { covered += open.contains(p) ? 1 : 0; });
      if (covered > most) most = covered, best = c;
    }
    pairs_of(best, [&](const Pair& p) { open.erase(p); });
    cases.push_back(best);
  }
  return cases;
}

}  // namespace longspan::test
