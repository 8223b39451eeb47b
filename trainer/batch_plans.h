#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "ops/attention/documents.h"
#include "ops/core/context.h"
#include "parallel/comm/network.h"
#include "parallel/context/choose.h"
#include "parallel/context/placement.h"
#include "parallel/context/plan.h"
#include "parallel/context/routed_plan.h"
#include "trainer/model/options.h"
#include "trainer/model/seer.h"

namespace longspan::trainer {

// How the ranks of the cp axis share rows and attention.
struct ContextLayout {
  parallel::PlacementKind placement = parallel::PlacementKind::kZigzag;
  int64_t rows = 1, row_length = 0;  // of a micro-batch
  int64_t ranks = 1;
  parallel::StrategyOptions strategy{};  // heads and keep_rows are filled in
  // exchange: a layer whose received keys take at most so many bytes keeps them for the backward
  // pass.
  int64_t keep_key_bytes = 0;
  parallel::NetworkOptions network{};  // of auto
};

// Who does what in one micro-batch: integers only, from the model and the documents, the same on
// every rank but for whose plans they are. Immutable.
struct BatchPlans {
  std::shared_ptr<const ops::Documents> documents;
  std::shared_ptr<const parallel::Placement> placement;
  // One for each mixer; null where a mixer has none.
  std::vector<std::shared_ptr<const parallel::AttentionPlan>> plans, stream_plans;
  std::vector<std::shared_ptr<const parallel::RoutedPlan>> moba_plans;
  std::vector<std::shared_ptr<const SeerPlan>> seer_plans;
  // (query, key, query head) triples that attention evaluates on this rank, summed over layers, and
  // those that are left when gates are open.
  double attention_pairs = 0, open_pairs = 0;
  // Attention of the busiest rank and of the mean rank, summed over the layers whose mask is known
  // beforehand (ranks meet in each): AttentionPlan's figures.
  double work_max = 0, work_mean = 0;
  // Of all plans: ranks compare it before they exchange by them (CheckSamePlan).
  uint64_t hash = 0;
};

// Makes them for one rank of the cp axis, and keeps those of the last few document layouts, so that
// rows without document borders are planned once. One thread at a time.
//
// Errors    InvalidArgument for mixers that cannot be split over ranks, and for a strategy that
// does
//           not fit the ranks (StrategyOptions::Problems)
class BatchPlanner {
 public:
  BatchPlanner(const ModelOptions& model, const ContextLayout& layout, int cp_rank);

  const ContextLayout& layout() const { return layout_; }
  std::shared_ptr<const BatchPlans> PlansFor(std::shared_ptr<const ops::Documents> documents);

 private:
  std::shared_ptr<const parallel::Placement> Place(
      const std::shared_ptr<const ops::Documents>& documents) const;
  std::shared_ptr<const parallel::AttentionPlan> PlanOf(const ops::AttentionPattern& pattern,
                                                        const BatchPlans& batch,
                                                        const MixerOptions& mixer) const;
  void CountPairs(BatchPlans& batch) const;

  const ModelOptions model_;
  ContextLayout layout_;
  const int cp_rank_;
  Context ctx_;                                          // of the plans of routed layers
  std::shared_ptr<const parallel::Placement> fixed_;     // the same for all documents
  std::deque<std::shared_ptr<const BatchPlans>> cache_;  // most recent first
};

}  // namespace longspan::trainer
