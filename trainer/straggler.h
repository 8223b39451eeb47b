#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace longspan::trainer {

// A rank that computes much longer than the others, so that they wait for it in every step.
struct Straggler {
  int rank = 0;
  double own_s = 0;     // that it computed in a step
  double others_s = 0;  // median of the other ranks
};

// Finds stragglers in the times that ranks computed in each step. A rank is one when its time was
// more than kSlower times the median of the other ranks', and kLeastSeconds above it, in kSteps
// steps in a row; it is named once, and again only after a step in which it was not slow. Pure:
// ranks that are given the same numbers find the same stragglers.
class StragglerWatch {
 public:
  static constexpr double kSlower = 3;
  static constexpr int kSteps = 5;
  // Shorter delays are those of any busy machine.
  static constexpr double kLeastSeconds = 0.1;

  // One step: own_s[r] of rank r, equally many in every step; a negative time is not known and
  // changes nothing for its rank.
  std::vector<Straggler> Step(std::span<const double> own_s);

 private:
  std::vector<int> slow_steps_;  // by rank, in a row
};

}  // namespace longspan::trainer
