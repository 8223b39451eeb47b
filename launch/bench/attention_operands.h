#pragma once
#include <string>
#include <vector>

#include "launch/bench/cases.h"
#include "launch/bench/record.h"
#include "ops/core/context.h"

// What the benchmarks of masked and of routed attention share.
namespace longspan::launch {

// Random, the same for every case of one shape and dtype.
struct AttentionOperands {
  AttentionOperands(Context& ctx, const AttentionCase& c);
  Tensor q, k, v, d_out;
};

// ChooseImplementations among those of ctx's device, of moba those that it has.
std::vector<std::string> ChooseAttention(Context& ctx, const AttentionCase& c,
                                         const std::string& wanted);

// What both passes compute; lse undefined of sigmoid.
struct AttentionValues {
  Tensor o, lse, dq, dk, dv;
};
// RequireAgreement of all of them.
void RequireSameValues(const AttentionCase& c, const std::string& implementation,
                       const AttentionValues& got, const AttentionValues& expected);

}  // namespace longspan::launch
