#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "ops/attention/moba.h"
#include "parallel/context/head_gather.h"
#include "parallel/context/plan.h"

namespace longspan::parallel {

// What one rank does for routed attention (ops/attention/moba.h) of one micro-batch with the
// sequence split over the cp axis, as far as it does not depend on the data: integers, the same
// derivation on every rank, no communication. Placements deal mask blocks of 64 tokens, so the
// tokens of a routed block may lie on several ranks.
struct RoutedPlan {
  // Whose tokens of a block: rank, and the place of the block in that rank's share.
  struct Part {
    int32_t rank, index;
  };

  ops::MobaOptions options;
  int rank = 0, ranks = 1;
  int64_t kv_heads = 0, local_tokens = 0;
  // One rank: everything, and only `blocks` of what follows is set.
  std::shared_ptr<const ops::MobaPlan> whole{};

  std::shared_ptr<const ops::RoutedBlocks> blocks{};
  std::shared_ptr<const ops::RoutedQueries> queries{};  // this rank's
  std::vector<ops::RoutedShare> shares{};               // by rank
  std::vector<std::vector<Part>> parts{};               // by block, ascending ranks
  int64_t most_blocks = 0;                              // that one rank has tokens of
  // Mean keys [blocks, kv heads, D] from what ranks add to them [ranks, most_blocks, kv heads, D].
  HeadGather means{};
  // Causal attention inside each block: an ordinary plan of strategy exchange, on documents that
  // end where blocks do.
  std::shared_ptr<const AttentionPlan> own{};
  // Received rows (program.h) that stay for the backward pass when they all fit; otherwise they are
  // fetched again.
  int64_t keep_rows = 0;

  int64_t width() const { return ops::ChosenWidth(options, *blocks); }
  // (query, key) pairs of one query head and this rank's tokens, as MobaPlan::NominalPairs counts.
  int64_t NominalPairs() const;
  // Of what all ranks must agree on. 0 on one rank.
  uint64_t hash() const;
  // Bytes of a request: which blocks a rank needs, a bit for each block and kv head.
  int64_t RequestBytes() const { return kv_heads * ((blocks->count() + 7) / 8); }
  // Bytes that this rank sends in a forward pass to agree on who needs what: block summaries and
  // requests (Traffic::kControl). A backward pass sends none.
  int64_t ControlBytes(int64_t head_dim, DType dtype) const;
};

// `strategy`: keep_rows, ranks_per_node, stages and deduplicate apply, the last three to the own
// blocks alone; `kind` does not.
// Errors: InvalidArgument for options with Problems(), and for documents and a placement of
// different sizes.
std::shared_ptr<const RoutedPlan> MakeRoutedPlan(const ops::MobaOptions& options, int64_t kv_heads,
                                                 std::shared_ptr<const ops::Documents> documents,
                                                 std::shared_ptr<const Placement> placement,
                                                 const StrategyOptions& strategy, int rank);

}  // namespace longspan::parallel
