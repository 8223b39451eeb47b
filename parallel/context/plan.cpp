#include "parallel/context/plan.h"

namespace longspan::parallel {
namespace {

// `keys` lists the blocks of rank 0, 1, ... in their order.
std::vector<int64_t> GatheredRows(const ops::BlockList& keys, int64_t local_tokens) {
  std::vector<int64_t> rows;
  for (size_t i = 0; i < keys.ids.size(); ++i) {
    const int64_t token = keys.token_begin[i], rank = token / local_tokens;
    rows.push_back(token + rank * local_tokens);  // past the values of the ranks before
  }
  return rows;
}

}  // namespace

const char* ToString(StrategyKind kind) {
  return kind == StrategyKind::kRing ? "RING" : "ALL_GATHER";
}

int64_t AttentionPlan::VisiblePairs() const {
  int64_t pairs = 0;
  for (const PlanStage& stage : stages) pairs += stage.mask->TotalVisiblePairs();
  return pairs;
}

std::shared_ptr<const AttentionPlan> MakePlan(const ops::AttentionPattern& pattern,
                                              int64_t kv_heads,
                                              std::shared_ptr<const ops::Documents> documents,
                                              const Placement& placement, StrategyKind strategy,
                                              int rank) {
  auto plan = std::make_shared<AttentionPlan>();
  const int ranks = static_cast<int>(placement.ranks());
  plan->strategy = strategy;
  plan->rank = rank;
  plan->ranks = ranks;
  const ops::BlockList& queries = placement.blocks(rank);
  if (strategy == StrategyKind::kAllGather && ranks > 1) {
    std::vector<int32_t> ids;
    for (int r = 0; r < ranks; ++r) {
      const auto& part = placement.blocks(r).ids;
      ids.insert(ids.end(), part.begin(), part.end());
    }
    const ops::BlockList keys = ops::BlockList::FromIds(*documents, std::move(ids));
    plan->stages.push_back({-1, ops::BlockMask::Build(pattern, kv_heads, documents, queries, keys),
                            GatheredRows(keys, placement.local_tokens())});
    return plan;
  }
  for (int s = 0; s < ranks; ++s) {
    const int source = (rank - s + ranks) % ranks;
    plan->stages.push_back({source, ops::BlockMask::Build(pattern, kv_heads, documents, queries,
                                                          placement.blocks(source))});
  }
  return plan;
}

}  // namespace longspan::parallel
