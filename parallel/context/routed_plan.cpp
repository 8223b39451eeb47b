#include "parallel/context/routed_plan.h"

#include <algorithm>
#include <utility>

#include "parallel/context/fingerprint.h"

namespace longspan::parallel {
namespace {

// Sums of what ranks add to the mean keys, ascending ranks; a token of the gather is a kv head.
HeadGather GatherMeans(const RoutedPlan& plan) {
  HeadGather gather;
  gather.tokens = plan.kv_heads;
  for (size_t b = 0; b < plan.parts.size(); ++b) {
    const int64_t to = static_cast<int64_t>(b) * plan.kv_heads;
    bool first = true;
    for (const RoutedPlan::Part& part : plan.parts[b]) {
      const int64_t from = (part.rank * plan.most_blocks + part.index) * plan.kv_heads;
      if (first) gather.Add(to, 1, from, 1);
      if (!first) gather.AddSource(from, 1);
      first = false;
    }
  }
  return gather;
}

}  // namespace

int64_t RoutedPlan::NominalPairs() const {
  if (whole != nullptr) return whole->NominalPairs();
  return own->VisiblePairs() / kv_heads +
         ops::NominalChosenPairs(options, *blocks, shares[static_cast<size_t>(rank)]);
}

uint64_t RoutedPlan::hash() const {
  if (whole != nullptr) return 0;
  Fingerprint hash;
  hash.Add(own->figures.hash);  // documents cut into blocks, the placement, keep_rows
  hash.Add(options.block_size);
  hash.Add(options.top_k);
  return hash.value();
}

int64_t RoutedPlan::ControlBytes(int64_t head_dim, DType dtype) const {
  if (ranks == 1 || width() == 0) return 0;
  const int64_t summaries =
      most_blocks * kv_heads * head_dim * static_cast<int64_t>(SizeOf(AccumulatorOf(dtype)));
  return (ranks - 1) * (summaries + RequestBytes());
}

std::shared_ptr<const RoutedPlan> MakeRoutedPlan(const ops::MobaOptions& options, int64_t kv_heads,
                                                 std::shared_ptr<const ops::Documents> documents,
                                                 std::shared_ptr<const Placement> placement,
                                                 const StrategyOptions& strategy, int rank) {
  auto plan = std::make_shared<RoutedPlan>();
  plan->options = options;
  plan->rank = rank;
  plan->ranks = static_cast<int>(placement->ranks());
  plan->kv_heads = kv_heads;
  plan->local_tokens = placement->local_tokens(rank);
  plan->keep_rows = strategy.keep_rows;
  LONGSPAN_CHECK(documents->rows == placement->rows() &&
                 documents->row_length == placement->row_length())
      << "routed attention: documents of " << documents->rows << " rows of "
      << documents->row_length << " tokens and a placement of " << placement->rows() << " of "
      << placement->row_length();
  if (plan->ranks == 1) {
    plan->whole = ops::MobaPlan::Build(options, kv_heads, std::move(documents));
    plan->blocks = plan->whole->blocks;
    return plan;
  }
  const std::vector<std::string> problems = options.Problems();
  if (!problems.empty()) throw InvalidArgument(problems.front());
  plan->blocks = ops::RoutedBlocks::Build(options.block_size, std::move(documents));
  plan->parts.resize(static_cast<size_t>(plan->blocks->count()));
  for (int32_t r = 0; r < plan->ranks; ++r) {
    const ops::RoutedShare& share =
        plan->shares.emplace_back(ops::RoutedShare::Of(*plan->blocks, placement->blocks(r)));
    plan->most_blocks = std::max(plan->most_blocks, share.count());
    for (int32_t i = 0; i < share.count(); ++i) {
      plan->parts[static_cast<size_t>(share.block[static_cast<size_t>(i)])].push_back({r, i});
    }
  }
  plan->queries = ops::RoutedQueries::Of(*plan->blocks, plan->shares[static_cast<size_t>(rank)]);
  plan->means = GatherMeans(*plan);
  StrategyOptions exchange = strategy;
  exchange.kind = StrategyKind::kExchange;
  plan->own = MakePlan(ops::AttentionPattern::Causal(), kv_heads,
                       ops::BlocksAsDocuments(*plan->blocks), std::move(placement), exchange, rank);
  return plan;
}

}  // namespace longspan::parallel
