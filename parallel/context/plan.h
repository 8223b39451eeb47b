#pragma once
#include <memory>
#include <vector>

#include "ops/attention/block_mask.h"
#include "parallel/context/placement.h"

namespace longspan::parallel {

enum class StrategyKind { kRing, kAllGather };
const char* ToString(StrategyKind kind);

// One stage: this rank's queries against the keys that `source` owns (all_gather: against all keys,
// source -1).
struct PlanStage {
  int source;
  std::shared_ptr<const ops::BlockMask> mask;
  // all_gather: the row of gathered storage [P, 2, T] at which each block of mask->keys() starts;
  // its values start T rows later
  std::vector<int64_t> first_rows{};
};

// What one rank does for one attention pattern and one micro-batch: pure data, derived from the
// pattern, the documents, the placement and the strategy alone, without communication.
//
//   ring        stage s works on the keys of rank (rank - s) mod P, which arrive by neighbour hops;
//               a stage whose mask is empty computes nothing
//   all_gather  one stage over the keys of all ranks
// With one rank both are a single stage over the whole rows.
struct AttentionPlan {
  StrategyKind strategy = StrategyKind::kRing;
  int rank = 0, ranks = 1;
  std::vector<PlanStage> stages;

  int64_t VisiblePairs() const;  // (query, key) pairs of this rank, over kv heads
};

std::shared_ptr<const AttentionPlan> MakePlan(const ops::AttentionPattern& pattern,
                                              int64_t kv_heads,
                                              std::shared_ptr<const ops::Documents> documents,
                                              const Placement& placement, StrategyKind strategy,
                                              int rank);

}  // namespace longspan::parallel
