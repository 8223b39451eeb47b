#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "parallel/context/strategy.h"
#include "tests/support/numeric.h"

// One attention layer, forward and backward, split over ranks as threads: what the tests of the
// strategies run and compare.
namespace longspan::test {

struct StrategyCase {
  std::string name;
  ops::AttentionPattern pattern;
  std::vector<std::vector<int64_t>> ends;  // documents of each row
  int64_t row_length;
  parallel::PlacementKind placement;
  parallel::StrategyKind strategy;
  int ranks;
  DType dtype = DType::kF64;
  Device device{};
  ops::AttentionOptions options{};
};
inline ops::AttentionOptions Sigmoid(std::optional<double> bias = {}) {
  ops::AttentionOptions options;
  options.normalization = ops::Normalization::kSigmoid;
  options.bias = bias;
  return options;
}

inline constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 8;

struct Tensors {
  Vec q, k, v, d_out;
};

struct Outcome {
  Vec o, lse, dq, dk, dv;  // of sigmoid lse is empty
};
inline constexpr std::pair<const char*, Vec Outcome::*> kOutputs[] = {{"o", &Outcome::o},
                                                                      {"lse", &Outcome::lse},
                                                                      {"dq", &Outcome::dq},
                                                                      {"dk", &Outcome::dk},
                                                                      {"dv", &Outcome::dv}};

// Normal values that `representable` holds exactly.
Tensors Inputs(int64_t tokens, DType representable);

// Outputs and gradients in global order. Fails the test when a rank sends other bytes than
// PlannedTraffic says, or has an lse of sigmoid. Fresh memory is poisoned.
Outcome RunCase(const StrategyCase& c, const Tensors& in);

std::vector<std::pair<std::string, ops::AttentionPattern>> Patterns();

}  // namespace longspan::test
