#include "parallel/context/choose.h"

#include "ops/core/check.h"
#include "parallel/context/predict.h"

namespace longspan::parallel {

StrategyForecast Forecast(std::shared_ptr<const ContextDemand> demand,
                          const StrategyOptions& options, const PlanSizes& sizes,
                          const NetworkOptions& network) {
  const auto ranks = static_cast<size_t>(demand->ranks());
  const PlanMaker maker(std::move(demand), options);
  std::vector<Timeline> forward(ranks), backward(ranks);
  for (size_t r = 0; r < ranks; ++r) {
    PlanTimelines timelines =
        MakeTimelines(*maker.Build(static_cast<int>(r), /*with_masks=*/false), sizes);
    forward[r] = std::move(timelines.forward);
    backward[r] = std::move(timelines.backward);
  }
  const RankPrediction there = Predict(network, forward).largest;
  const RankPrediction back = Predict(network, backward).largest;
  return {options, there.finish_s, back.finish_s, there.exposed_s, back.exposed_s};
}

std::vector<StrategyOptions> StrategyCandidates(const StrategyOptions& options, int64_t kv_heads,
                                                int ranks, const NetworkOptions& network) {
  StrategyOptions base = options;
  if (base.ranks_per_node == 0) base.ranks_per_node = network.ranks_per_node;
  const int node = base.ranks_per_node;
  std::vector<StrategyOptions> candidates;
  const auto add = [&](StrategyOptions o) {
    if (o.Problems(kv_heads, ranks).empty()) candidates.push_back(o);
  };
  const auto with = [&](StrategyKind kind) {
    StrategyOptions o = base;
    o.kind = kind;
    return o;
  };
  for (const int stages : {1, 2, 3, 4}) {
    if (base.stages > 0 && stages != base.stages) continue;
    StrategyOptions o = with(StrategyKind::kExchange);
    o.stages = stages;
    add(o);
  }
  if (base.stages > 4) add(with(StrategyKind::kExchange));
  add(with(StrategyKind::kUlysses));
  for (const StrategyKind outer : {StrategyKind::kExchange, StrategyKind::kRing}) {
    if (ranks < 4) continue;  // groups of one rank, or one group
    StrategyOptions o = with(StrategyKind::kHybrid);
    o.outer = outer;
    add(o);
  }
  add(with(StrategyKind::kRing));
  if (node > 1 && node < ranks) add(with(StrategyKind::kDoubleRing));
  add(with(StrategyKind::kAllGather));
  return candidates;
}

StrategyOptions ChooseStrategy(std::shared_ptr<const ContextDemand> demand,
                               const StrategyOptions& options, const PlanSizes& sizes,
                               const NetworkOptions& network,
                               std::vector<StrategyForecast>* forecasts) {
  if (options.kind != StrategyKind::kAuto) return options;
  StrategyOptions with_heads = options;
  with_heads.heads = sizes.heads;
  const auto candidates = StrategyCandidates(with_heads, demand->kv_heads(),
                                             static_cast<int>(demand->ranks()), network);
  LONGSPAN_CHECK(!candidates.empty()) << "ChooseStrategy: no strategy takes these options";
  std::vector<StrategyForecast> all;
  size_t best = 0;
  for (const StrategyOptions& candidate : candidates) {
    all.push_back(Forecast(demand, candidate, sizes, network));
    if (all.back().seconds() < all[best].seconds()) best = all.size() - 1;
  }
  const StrategyOptions chosen = all[best].options;
  if (forecasts != nullptr) *forecasts = std::move(all);
  return chosen;
}

}  // namespace longspan::parallel
