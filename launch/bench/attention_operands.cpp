#include "launch/bench/attention_operands.h"

#include <algorithm>
#include <utility>

#include "launch/bench/operands.h"
#include "ops/attention/attention.h"

namespace longspan::launch {

AttentionOperands::AttentionOperands(Context& ctx, const AttentionCase& c) {
  const Shape query_shape{c.tokens, c.heads, c.head_dim},
      key_shape{c.tokens, c.kv_heads, c.head_dim};
  q = RandomTensor(ctx, query_shape, c.dtype, 1);
  k = RandomTensor(ctx, key_shape, c.dtype, 2);
  v = RandomTensor(ctx, key_shape, c.dtype, 3);
  d_out = RandomTensor(ctx, query_shape, c.dtype, 4);
}

std::vector<std::string> ChooseAttention(Context& ctx, const AttentionCase& c,
                                         const std::string& wanted) {
  const DeviceKind device = ctx.device().kind;
  const std::vector<std::string> routed = ops::MobaImplementations(device);
  std::vector<Candidate> candidates;
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    if (entry.device != device) continue;
    if (c.moba.has_value() && std::find(routed.begin(), routed.end(), entry.name) == routed.end()) {
      continue;
    }
    candidates.push_back(
        {entry.name, entry.rejects({.dtype = c.dtype,
                                    .heads = c.heads,
                                    .kv_heads = c.kv_heads,
                                    .head_dim = c.head_dim,
                                    .shared_bytes = ops::AttentionSharedBytes(ctx)})});
  }
  return ChooseImplementations(c.name, candidates, wanted);
}

void RequireSameValues(const AttentionCase& c, const std::string& implementation,
                       const AttentionValues& got, const AttentionValues& expected) {
  for (const auto& [what, value] : {std::pair{"o", &AttentionValues::o},
                                    {"lse", &AttentionValues::lse},
                                    {"dq", &AttentionValues::dq},
                                    {"dk", &AttentionValues::dk},
                                    {"dv", &AttentionValues::dv}}) {
    if (!(expected.*value).defined()) continue;
    RequireAgreement(c.name, implementation, what, RelativeDifference(got.*value, expected.*value),
                     c.dtype);
  }
}

}  // namespace longspan::launch
