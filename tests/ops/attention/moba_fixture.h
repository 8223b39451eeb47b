#pragma once
#include <string>
#include <vector>

#include "ops/attention/moba.h"
#include "tests/ops/attention/moba_oracle.h"

namespace longspan::test {

// A problem with inputs drawn from a seed.
struct MobaCase {
  MobaProblem problem;
  DType dtype = DType::kF32;
  uint64_t seed = 1;
  std::string Name() const;
};
struct MobaInputs {
  Vec q, k, v, d_out;
};
MobaInputs MakeMobaInputs(const MobaCase& c);
std::shared_ptr<const ops::MobaPlan> MobaPlanOf(const MobaCase& c);

// The implementations of ctx's device that take the problem.
std::vector<std::string> MobaImplementationsFor(const Context& ctx, const MobaCase& c);

struct MobaRun {
  Vec o, lse, dq, dk, dv;
  std::vector<int32_t> selected;  // [heads, T, width]
};
MobaRun RunMoba(Context& ctx, const MobaCase& c, const MobaInputs& in,
                const std::string& implementation);

// What a run chose, in terms of the oracle's candidates; adds a failure where it is no choice.
MobaChoice ChoiceOf(const MobaCase& c, const std::vector<int32_t>& selected);

}  // namespace longspan::test
