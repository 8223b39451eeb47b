#include "trainer/batch_plans.h"

#include <algorithm>

#include "parallel/context/balance.h"
#include "parallel/context/fingerprint.h"

namespace longspan::trainer {
namespace {

constexpr size_t kCachedLayouts = 4;

// What a routed layer makes its tokens see, for balancing: about as many keys each.
ops::AttentionPattern NominalPattern(const MixerOptions& mixer) {
  return mixer.moba ? ops::AttentionPattern::Window(mixer.moba->block_size * mixer.moba->top_k)
                    : mixer.pattern;
}

}  // namespace

BatchPlanner::BatchPlanner(const ModelOptions& model, const ContextLayout& layout, int cp_rank)
    : model_(model), layout_(layout), cp_rank_(cp_rank), ctx_(ContextOptions{.threads = 1}) {
  for (const MixerOptions& mixer : model_.mixers) {
    LONGSPAN_CHECK(!mixer.seer || layout_.ranks == 1)
        << "mixer " << mixer.name << " is of kind seer, which is not built for context parallelism";
    LONGSPAN_CHECK(!(mixer.moba || mixer.seer || mixer.duo) || !mixer.IsSigmoid())
        << "mixer " << mixer.name << " is built for softmax only";
  }
  layout_.strategy.heads = model_.num_heads;
  layout_.strategy.keep_rows =
      layout_.keep_key_bytes / (2 * model_.head_dim * static_cast<int64_t>(SizeOf(model_.compute)));
  parallel::StrategyOptions strategy = layout_.strategy;
  if (strategy.kind == parallel::StrategyKind::kAuto) strategy.kind = {};  // takes what fits
  const auto problems = strategy.Problems(model_.num_kv_heads, static_cast<int>(layout_.ranks));
  LONGSPAN_CHECK(problems.empty()) << problems.front();
  if (layout_.placement != parallel::PlacementKind::kBalanced || layout_.ranks == 1) {
    const auto kind = layout_.ranks == 1 ? parallel::PlacementKind::kContiguous : layout_.placement;
    fixed_ = std::make_shared<const parallel::Placement>(kind, layout_.rows, layout_.row_length,
                                                         layout_.ranks);
  }
}

std::shared_ptr<const parallel::Placement> BatchPlanner::Place(
    const std::shared_ptr<const ops::Documents>& documents) const {
  if (fixed_ != nullptr) return fixed_;
  std::vector<parallel::BalanceLayer> layers;
  for (size_t m = 0; m < model_.mixers.size(); ++m) {
    const MixerOptions& mixer = model_.mixers[m];
    const int64_t count = std::count(model_.layers.begin(), model_.layers.end(), m);
    layers.push_back({NominalPattern(mixer), count});
    if (mixer.duo) layers.push_back({mixer.duo->Stream(), count});
  }
  return std::make_shared<const parallel::Placement>(
      parallel::BalancedPlacement(layers, model_.num_kv_heads, documents, layout_.ranks));
}

std::shared_ptr<const parallel::AttentionPlan> BatchPlanner::PlanOf(
    const ops::AttentionPattern& pattern, const BatchPlans& batch,
    const MixerOptions& mixer) const {
  if (layout_.ranks == 1) {
    return parallel::MakePlan(pattern, model_.num_kv_heads, batch.documents, batch.placement,
                              parallel::StrategyOptions{}, cp_rank_);
  }
  const auto demand = parallel::ContextDemand::Build(pattern, model_.num_kv_heads, batch.documents,
                                                     batch.placement);
  const parallel::PlanSizes sizes{.heads = model_.num_heads,
                                  .head_dim = model_.head_dim,
                                  .dtype = model_.compute,
                                  .sigmoid = mixer.IsSigmoid()};
  const parallel::StrategyOptions strategy =
      parallel::ChooseStrategy(demand, layout_.strategy, sizes, layout_.network);
  return parallel::PlanMaker(demand, strategy).Build(cp_rank_);
}

std::shared_ptr<const BatchPlans> BatchPlanner::PlansFor(
    std::shared_ptr<const ops::Documents> documents) {
  for (const auto& plans : cache_) {
    if (*plans->documents == *documents) return plans;
  }
  auto batch = std::make_shared<BatchPlans>();
  batch->documents = documents;
  batch->placement = Place(documents);
  parallel::Fingerprint hash;
  for (const MixerOptions& mixer : model_.mixers) {
    const auto plan = [&](bool wanted, const ops::AttentionPattern& pattern) {
      return wanted ? PlanOf(pattern, *batch, mixer) : nullptr;
    };
    batch->plans.push_back(plan(!mixer.moba.has_value(), mixer.pattern));
    batch->stream_plans.push_back(
        plan(mixer.duo.has_value(), mixer.duo ? mixer.duo->Stream() : mixer.pattern));
    batch->moba_plans.push_back(
        mixer.moba ? parallel::MakeRoutedPlan(*mixer.moba, model_.num_kv_heads, documents,
                                              batch->placement, layout_.strategy, cp_rank_)
                   : nullptr);
    batch->seer_plans.push_back(mixer.seer ? MakeSeerPlan(ctx_, model_, *mixer.seer, *documents)
                                           : nullptr);
    for (const auto& p : {batch->plans.back(), batch->stream_plans.back()}) {
      if (p != nullptr) hash.Add(p->figures.hash);
    }
    if (mixer.moba) hash.Add(batch->moba_plans.back()->hash());
  }
  batch->hash = hash.value();
  CountPairs(*batch);
  cache_.push_front(batch);
  if (cache_.size() > kCachedLayouts) cache_.pop_back();
  return batch;
}

void BatchPlanner::CountPairs(BatchPlans& batch) const {
  const double group = static_cast<double>(model_.num_heads / model_.num_kv_heads);
  const auto pairs_of = [group](const std::shared_ptr<const parallel::AttentionPlan>& p) {
    return p == nullptr ? 0.0 : group * static_cast<double>(p->VisiblePairs());
  };
  for (const int layer : model_.layers) {
    const auto m = static_cast<size_t>(layer);
    const MixerOptions& mixer = model_.mixers[m];
    const double open =
        mixer.moba ? static_cast<double>(model_.num_heads * batch.moba_plans[m]->NominalPairs())
                   : pairs_of(batch.plans[m]);
    const double kept = mixer.seer ? batch.seer_plans[m]->KeptShare(mixer.seer->selection) : 1.0;
    batch.open_pairs += open;
    batch.attention_pairs += kept * open + pairs_of(batch.stream_plans[m]);
    for (const auto& p : {batch.plans[m], batch.stream_plans[m]}) {
      if (p == nullptr) continue;
      batch.work_max += p->figures.work_max;
      batch.work_mean += p->figures.work_mean;
    }
  }
}

}  // namespace longspan::trainer
