#pragma once
#include <memory>

#include "parallel/context/routed_exchange.h"
#include "parallel/context/routed_plan.h"
#include "parallel/context/strategy.h"

namespace longspan::parallel {

// Routed attention (ops/attention/moba.h) with the sequence split over the cp axis. Every rank
// passes its own tokens in the order of its placement and gets the outputs and gradients of exactly
// those tokens. Queries stay at home:
//   1. every rank sums its keys of every block; the sums are all-gathered and added in ascending
//      rank, so that all ranks have all mean keys                                     [control]
//   2. each rank chooses for its queries, and all learn which (kv head, block) pieces each needs:
//      those that a query of the rank and a query head of the kv head chose            [control]
//   3. owners send their tokens of these pieces, once to each rank that needs them; meanwhile the
//      attention to own blocks computes, an ordinary plan (strategy exchange)
//   4. the attention to chosen blocks continues from those results
// Backward: keys are kept or fetched again; own blocks; dK and dV of chosen blocks, which travel to
// the owners while dQ computes and are added there, own share first, then in ascending rank.
//
// Shapes    q, o [T, Hq, D]; k, v [T, Hkv, D] with T = plan.local_tokens, which may be 0; lse
//           [T, Hq]
// Dtypes    as ContextAttentionForward
// Numerics  as moba.h. A block's mean is a sum over ranks, so gates differ from those of one rank
//           by rounding. The same bits whether keys are kept or fetched, and in every run
// Errors    InvalidArgument for operands that do not fit the plan, before anything is sent
// Devices   cpu, cuda (f32 and bf16). On a GPU the host waits once for the requests
// Counted  as Traffic::kRouted but for what is marked [control], waits in the Trace as kRoutedWait
inline constexpr const char* kRoutedWait = "wait of routed";

struct RoutedResult {
  Tensor o, lse;
  ops::RoutedLists lists{};                          // this rank's choice
  std::shared_ptr<const RoutedExchange> exchange{};  // several ranks and blocks to choose
  Tensor keys{};                                     // the arena, where it stays
  Tensor own_kept{};                                 // of the plan of own blocks
};

// Collective.
RoutedResult RoutedContextForward(Context& ctx, Communicator& comm, const RoutedPlan& plan,
                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                  const ops::AttentionOptions& options = {});
// Collective. `saved` is the result of the forward pass with the same plan.
ContextAttentionGrads RoutedContextBackward(Context& ctx, Communicator& comm,
                                            const RoutedPlan& plan, const Tensor& d_out,
                                            const Tensor& q, const Tensor& k, const Tensor& v,
                                            const RoutedResult& saved,
                                            const ops::AttentionOptions& options = {});

}  // namespace longspan::parallel
