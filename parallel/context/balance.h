#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "ops/attention/documents.h"
#include "ops/attention/pattern.h"
#include "parallel/context/placement.h"

namespace longspan::parallel {

// Placements that give every rank as much attention to compute as any other, whatever the mask.
//
// Work is counted for every block row (the queries of one mask block): its visible (query, key)
// pairs, over kv heads and layers. Every rank gets floor or ceil (blocks / ranks) blocks of each
// row, so that everything outside of attention stays even too.
//
// The search cuts a row into ranks x m chunks of equal size, for m = 1, 2, 4, ... down to single
// blocks, deals the chunks by falling work to the rank that has least [LPT rule, as in
// MagiAttention's dispatch], and exchanges equally large chunks between the rank that has most and
// others while that helps. Of all placements within 1 % of the best it takes the one that moves the
// fewest keys, then the one with the longest runs of blocks: besides those just described,
// contiguous and zigzag ones as they are, and mended by as few exchanges as bring them within 1 %.
//
// Deterministic, integers only: every rank finds the same placement without communication.

// A kind of attention layer, as balancing sees it.
struct BalanceLayer {
  ops::AttentionPattern pattern;
  int64_t layers = 1;  // how many layers of the model have it; or any other weight, >= 0
};

// Work of all blocks of the micro-batch. Throws InvalidArgument for a pattern with Problems().
std::vector<int64_t> BlockRowWork(std::span<const BalanceLayer> layers, int64_t kv_heads,
                                  const std::shared_ptr<const ops::Documents>& documents);

// The balanced placement of a micro-batch, with the keys that move counted exactly: for every
// layer, rank and kv head the blocks that the rank needs and does not hold. Placement::Balanced()
// is the same without masks, which leaves the length of runs to decide.
Placement BalancedPlacement(std::span<const BalanceLayer> layers, int64_t kv_heads,
                            const std::shared_ptr<const ops::Documents>& documents, int64_t ranks);

// How even a placement is. `floor` is what no placement of this form can beat: the larger of the
// mean and the heaviest block together with the lightest ones that fill up its rank.
struct BalanceFigures {
  int64_t largest = 0;  // work of the rank that has most
  int64_t mean = 0;     // rounded up
  int64_t floor = 0;
};
BalanceFigures MeasureBalance(const Placement& placement, std::span<const int64_t> work);

}  // namespace longspan::parallel
