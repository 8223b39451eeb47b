#pragma once
#include <memory>
#include <string>
#include <vector>

#include "parallel/comm/network.h"
#include "parallel/context/plan.h"

namespace longspan::parallel {

// Sizes that turn a plan into bytes and floating-point operations.
struct PlanSizes {
  int64_t heads = 0, head_dim = 0;  // kv heads are the plan's
  DType dtype = DType::kF32;        // of q, k, v and d_out
  bool sigmoid = false;
};

// What one rank does in both passes, as Predict replays it; messages name ranks of cp.
struct PlanTimelines {
  Timeline forward, backward;
};
PlanTimelines MakeTimelines(const AttentionPlan& plan, const PlanSizes& sizes);

struct StrategyForecast {
  StrategyOptions options;
  double forward_s = 0, backward_s = 0;                  // of the slowest rank
  double forward_exposed_s = 0, backward_exposed_s = 0;  // of the rank that waits longest
  double seconds() const { return forward_s + backward_s; }
};

// One layer's passes over this micro-batch with `options` on a network, by the plans of all ranks.
// Errors as PlanMaker and Predict.
StrategyForecast Forecast(std::shared_ptr<const ContextDemand> demand,
                          const StrategyOptions& options, const PlanSizes& sizes,
                          const NetworkOptions& network);

// What kAuto chooses among, for a network and `ranks` ranks: all other strategies, exchange with
// one to four stages, all_gather and ulysses, hybrid with rings and with exchange outside.
// `options` gives everything that is not varied; network.ranks_per_node where
// options.ranks_per_node is 0.
std::vector<StrategyOptions> StrategyCandidates(const StrategyOptions& options, int64_t kv_heads,
                                                int ranks, const NetworkOptions& network);

// The candidate with the least time of both passes; of equals the first. Options of another kind
// than kAuto come back as they are. The same on every rank that asks with the same arguments:
// arithmetic on equal inputs in a fixed order, no clocks and no communication. `forecasts`: all
// candidates in their order.
//
// Time     candidates times ranks times the time of a plan without masks: choose once per pattern,
//          not for every micro-batch
StrategyOptions ChooseStrategy(std::shared_ptr<const ContextDemand> demand,
                               const StrategyOptions& options, const PlanSizes& sizes,
                               const NetworkOptions& network,
                               std::vector<StrategyForecast>* forecasts = nullptr);

}  // namespace longspan::parallel
