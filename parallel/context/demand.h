#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "ops/attention/block_mask.h"
#include "parallel/context/placement.h"

namespace longspan::parallel {

// Who needs which keys: for one attention pattern, the documents of a micro-batch and a placement,
// the key blocks that the queries of every rank see, and how much work there is between every two
// ranks. Everything that planning, balancing and forecasts read; the same on every rank, integers
// without communication.
//
// A key block is needed by a rank and kv head when some query of the rank sees some key of it. Kv
// heads with equal rules share a head pattern, as in BlockMask.
//
// Memory   patterns * ranks * blocks bits, and `ranks` counts of pairs for every (pattern, rank)
//          that PairsBetween has been asked for
// Time     one walk over the runs of the whole row's mask: a million tokens on 1024 ranks take less
//          than a second per pattern, random tiles at density 0.01 included (at 0.1 there are 27
//          million runs of one block, about 1.5 s); another walk over the rows of a rank when
//          PairsBetween is first asked for it
// Threads  immutable once built; PairsBetween may be asked from several threads
// Errors   InvalidArgument for a pattern with Problems() and for documents and a placement of
//          different sizes
class ContextDemand {
 public:
  static std::shared_ptr<const ContextDemand> Build(const ops::AttentionPattern& pattern,
                                                    int64_t kv_heads,
                                                    std::shared_ptr<const ops::Documents> documents,
                                                    std::shared_ptr<const Placement> placement);

  int64_t ranks() const;
  int64_t blocks() const;  // of all rows
  int64_t kv_heads() const;
  int64_t patterns() const;
  int32_t pattern_of(int64_t kv_head) const;
  int64_t heads_of(int64_t head_pattern) const;  // how many kv heads have it
  const Placement& placement() const;
  const std::shared_ptr<const Placement>& shared_placement() const;
  const std::shared_ptr<const ops::Documents>& documents() const;
  const ops::AttentionPattern& pattern() const;

  bool Needs(int rank, int64_t head_pattern, int64_t block) const;
  // Ascending ids of the blocks of `owner` that `rank` needs for this head pattern.
  std::vector<int32_t> NeededFrom(int rank, int owner, int64_t head_pattern) const;
  // Exact (query, key) pairs of one kv head with this pattern between the queries of `rank` and the
  // keys of `owner`; the second: and all keys.
  int64_t PairsBetween(int64_t head_pattern, int rank, int owner) const;
  int64_t Pairs(int64_t head_pattern, int rank) const;
  int64_t TotalPairs(int rank) const;  // over all kv heads

  // Rows (one token of one kv head, K and V) that `rank` needs and does not own: the least that any
  // strategy which keeps queries at home can bring to it (bytes = rows * 2 * head_dim * element).
  int64_t LowerBoundRows(int rank) const;
  // Distinct rows needed by the ranks [node * ranks_per_node, ...) from ranks of other nodes.
  int64_t NodeLowerBoundRows(int node, int ranks_per_node) const;

  // The demand of an attention whose kv head i has the rule of kv head `kv_heads[i]` of this one
  // (repeats allowed): what a rank that holds only some heads plans with. Same placement, no new
  // walk. Throws InvalidArgument for a head that does not exist.
  std::shared_ptr<const ContextDemand> SelectHeads(std::span<const int32_t> kv_heads) const;
  // The mask of these heads (after SelectHeads: of the selected ones) between two block lists.
  std::shared_ptr<const ops::BlockMask> Mask(const ops::BlockList& queries,
                                             const ops::BlockList& keys) const;

  // Fingerprint of pattern, kv heads, documents and placement: ranks compare it before they
  // exchange by it.
  uint64_t Hash() const;

 private:
  struct Data;
  struct Selection;
  // Of a head pattern of this demand: what `data_` calls it.
  size_t Walked(int64_t head_pattern) const;

  std::shared_ptr<const Data> data_;
  std::shared_ptr<const Selection> selection_;  // null: all heads
};

}  // namespace longspan::parallel
