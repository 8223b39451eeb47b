#pragma once
#include <functional>
#include <string>
#include <vector>

#include "launch/bench/cases.h"
#include "launch/bench/record.h"
#include "parallel/comm/network.h"
#include "parallel/context/placement.h"
#include "parallel/context/plan.h"

namespace longspan::launch {

// One layer of attention split over ranks that are threads of this process, on a network that
// exists on paper (parallel/comm/simulated.h): data is really moved and computed, time is that of
// the modelled network and of ranks that compute `network.flops_per_s`, so a case repeats exactly
// on any machine.
struct ContextParallelOptions {
  std::vector<parallel::StrategyOptions> strategies;  // of any kind; heads and nodes are filled in
  std::vector<parallel::PlacementKind> placements;
  std::vector<int> ranks;
  parallel::NetworkOptions network;
  // Above 0: both links get the rate at which the keys and values that a rank of a dense ring sends
  // forward take this many times as long as the layer's own forward computation (mean of ranks).
  double dense_ring_time = 0;
  // Only plans and forecasts: nothing is moved or computed, so that large rows take no time.
  bool plan_only = false;
  bool forward = true, backward = true;
};

// One record per placement, rank count, strategy and pass. Beside what all records have (flops of
// the mean rank, bytes of the rank that receives most at least, peaks of one rank and of its link
// inside the node, and as time that of the slowest rank):
//
//   mask, strategy, placement     in lower case; auto is followed by its choice in `impl`
//   ranks, ranks_per_node
//   bytes_planned, bytes_moved    sent by all ranks: what plans say, what a counting communicator
//                                 saw (absent with plan_only)
//   worst_rank_bytes              planned, sent or received by the rank with most
//   lower_bound_bytes             of all ranks, where queries stay at home: needed keys and values
//                                 of others, and backward their gradients
//   dense_ring_bytes              what a ring sends in this pass
//   work_max_over_mean            visible pairs computed by the busiest rank over the mean
//   balance_floor                 the least that whole block rows allow for that figure
//   compute_ms, exposed_ms        of the rank with most; waiting for transfers is exposed
//   step_ms                       the slowest rank
//   predicted_ms                  what the plans predict for step_ms
//   plan_ms                       this machine's time to plan one rank
//
// `emit` gets each record when it is there. Errors: InvalidArgument for what a strategy cannot do.
void BenchContextParallel(const AttentionCase& c, const ContextParallelOptions& options,
                          const std::function<void(const BenchRecord&)>& emit);

// The same as text.
std::string ContextParallelHead(size_t name_width);
std::string ContextParallelLine(const BenchRecord& record, size_t name_width);

}  // namespace longspan::launch
