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
  parallel::PlacementKind placement = parallel::PlacementKind::kContiguous;
  parallel::StrategyOptions strategy{};  // heads are set by RunCase
  int ranks = 1;
  DType dtype = DType::kF64;
  Device device{};
  ops::AttentionOptions options{};
  int64_t heads = 4, kv_heads = 2;

  int64_t tokens() const { return static_cast<int64_t>(ends.size()) * row_length; }
  std::string Describe() const;
};
inline parallel::StrategyOptions StrategyOf(parallel::StrategyKind kind) { return {.kind = kind}; }
inline ops::AttentionOptions Sigmoid(std::optional<double> bias = {}) {
  ops::AttentionOptions options;
  options.normalization = ops::Normalization::kSigmoid;
  options.bias = bias;
  return options;
}

inline constexpr int64_t kDim = 8;

struct Tensors {
  Vec q, k, v, d_out;
};

// Bytes that arrived at rank [r] from rank [peer].
using Arrivals = std::vector<std::vector<int64_t>>;

struct Outcome {
  Vec o, lse, dq, dk, dv;  // of sigmoid lse is empty
  Arrivals forward, backward;
};
inline constexpr std::pair<const char*, Vec Outcome::*> kOutputs[] = {{"o", &Outcome::o},
                                                                      {"lse", &Outcome::lse},
                                                                      {"dq", &Outcome::dq},
                                                                      {"dk", &Outcome::dk},
                                                                      {"dv", &Outcome::dv}};

// RelMax of an output of two cases; lse of queries that see nothing must be -inf in both. +inf for
// NaN anywhere.
double Difference(const Vec& got, const Vec& expected);

// Normal values that `representable` holds exactly, for the sizes of a case.
Tensors Inputs(const StrategyCase& c, DType representable);

std::shared_ptr<const ops::Documents> DocumentsOf(const StrategyCase& c);
// Balanced placements go by the case's own pattern.
std::shared_ptr<const parallel::Placement> PlacementOf(const StrategyCase& c);
std::shared_ptr<const parallel::ContextDemand> DemandOf(const StrategyCase& c);

// Outputs and gradients in global order. Fails the test when a rank sends other bytes than
// PlannedTraffic says, or has an lse of sigmoid. Fresh memory is poisoned.
Outcome RunCase(const StrategyCase& c, const Tensors& in);

// Patterns of the library, the families of LongCA-bench (arXiv 2510.17896) among them: its families
// with documents are these with packed rows.
std::vector<std::pair<std::string, ops::AttentionPattern>> Patterns(int64_t kv_heads = 2);

}  // namespace longspan::test
