#include "tests/ops/attention/moba_fixture.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/support/device.h"

namespace longspan::test {

std::string MobaCase::Name() const {
  return Str(problem.Name(), " ", ToString(dtype), " seed ", seed);
}

MobaInputs MakeMobaInputs(const MobaCase& c) {
  const MobaProblem& p = c.problem;
  const int64_t q_size = p.tokens() * p.heads * p.dim, k_size = p.tokens() * p.kv_heads * p.dim;
  return {Normal(q_size, c.seed, c.dtype), Normal(k_size, c.seed + 1, c.dtype),
          Normal(k_size, c.seed + 2, c.dtype), Normal(q_size, c.seed + 3, c.dtype)};
}

std::shared_ptr<const ops::MobaPlan> MobaPlanOf(const MobaCase& c) {
  return ops::MobaPlan::Build({.block_size = c.problem.block_size, .top_k = c.problem.top_k},
                              c.problem.kv_heads, c.problem.documents);
}

std::vector<std::string> MobaImplementationsFor(const Context& ctx, const MobaCase& c) {
  std::vector<std::string> names;
  const ops::AttentionProblem problem{.dtype = c.dtype,
                                      .heads = c.problem.heads,
                                      .kv_heads = c.problem.kv_heads,
                                      .head_dim = c.problem.dim,
                                      .shared_bytes = ops::AttentionSharedBytes(ctx)};
  const DeviceKind device = ctx.device().kind;
  const std::vector<std::string> routed = ops::MobaImplementations(device);
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    const bool known = std::find(routed.begin(), routed.end(), entry.name) != routed.end();
    if (known && entry.device == device && entry.rejects(problem).empty()) {
      names.push_back(entry.name);
    }
  }
  return names;
}

MobaRun RunMoba(Context& ctx, const MobaCase& c, const MobaInputs& in,
                const std::string& implementation) {
  const MobaProblem& p = c.problem;
  const auto plan = MobaPlanOf(c);
  const Tensor q = FromVec(ctx, {p.tokens(), p.heads, p.dim}, c.dtype, in.q);
  const Tensor k = FromVec(ctx, {p.tokens(), p.kv_heads, p.dim}, c.dtype, in.k);
  const Tensor v = FromVec(ctx, k.shape(), c.dtype, in.v);
  const Tensor d_out = FromVec(ctx, q.shape(), c.dtype, in.d_out);
  const ops::AttentionOptions options{.scale = p.scale, .implementation = implementation};
  const ops::MobaResult forward = ops::MobaForward(ctx, q, k, v, *plan, options);
  const Tensor delta = ops::AttentionDelta(ctx, d_out, forward.o);
  const ops::MobaGradients grads =
      ops::MobaBackward(ctx, d_out, q, k, v, forward.lse, delta, forward.lists, *plan, options);
  MobaRun run{ToVec(forward.o), ToVec(forward.lse), ToVec(grads.dq),
              ToVec(grads.dk),  ToVec(grads.dv),    {}};
  if (plan->width() > 0) {
    run.selected.resize(static_cast<size_t>(forward.lists.selected.numel()));
    CopyToHost(forward.lists.selected, run.selected.data());
  }
  return run;
}

MobaChoice ChoiceOf(const MobaCase& c, const std::vector<int32_t>& selected) {
  const MobaProblem& p = c.problem;
  const auto plan = MobaPlanOf(c);
  const ops::RoutedBlocks& blocks = *plan->blocks;
  const int64_t width = plan->width();
  MobaChoice choice(static_cast<size_t>(p.tokens() * p.heads));
  for (int64_t t = 0; t < p.tokens(); ++t) {
    const std::vector<MobaCandidate> candidates = MobaCandidates(p, t);
    for (int64_t h = 0; h < p.heads; ++h) {
      std::vector<size_t>& chosen = choice[static_cast<size_t>(t * p.heads + h)];
      for (int64_t i = 0; i < width; ++i) {
        const int32_t block = selected[static_cast<size_t>((h * p.tokens() + t) * width + i)];
        if (block == -1) continue;
        if (block < 0 || block >= blocks.count() || chosen.size() != static_cast<size_t>(i)) {
          ADD_FAILURE() << c.Name() << ": token " << t << " head " << h << " entry " << i << " is "
                        << block;
          return choice;
        }
        const size_t b = static_cast<size_t>(block);
        const MobaCandidate range{blocks.begin[b], blocks.begin[b + 1]};
        const auto at = std::find(candidates.begin(), candidates.end(), range);
        EXPECT_NE(at, candidates.end()) << c.Name() << ": token " << t << " chose the tokens ["
                                        << range.begin << ", " << range.end << ")";
        if (at == candidates.end()) return choice;
        chosen.push_back(static_cast<size_t>(at - candidates.begin()));
      }
      const size_t expected = std::min(candidates.size(), static_cast<size_t>(p.top_k - 1));
      EXPECT_EQ(chosen.size(), expected) << c.Name() << ": token " << t << " head " << h;
      EXPECT_TRUE(std::adjacent_find(chosen.begin(), chosen.end(), std::greater_equal<>()) ==
                  chosen.end())
          << c.Name() << ": token " << t << " head " << h << " is not ascending";
    }
  }
  return choice;
}

}  // namespace longspan::test
