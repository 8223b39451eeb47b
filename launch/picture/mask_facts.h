#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/attention/moba.h"

namespace longspan::launch {

// How much of plain attention a mask keeps.
//   visible_fraction = visible pairs / pairs of plain causal attention on the same rows
//   block_fraction   = the same in 64 x 64 blocks with at least one visible pair
// Both are means over the kv heads. A pattern that also looks ahead is compared with all
// pairs of a row instead, so that 1 means "nothing left out" for every pattern.
struct MaskFacts {
  double visible_fraction = 0;
  double block_fraction = 0;
  int64_t visible_pairs = 0;  // summed over the kv heads
};

// Of a mask over whole rows: its queries and keys are all blocks of its documents.
MaskFacts FactsOf(const ops::BlockMask& mask);
// Of one kv head alone.
MaskFacts FactsOfHead(const ops::BlockMask& mask, int64_t kv_head);

// Of routed attention, taking what it can choose at most (MobaPlan::NominalPairs of a query head
// for each kv head). block_fraction counts what is chosen as whole blocks of 64 x 64 pairs.
MaskFacts FactsOf(const ops::MobaPlan& plan);

// One row of `length` tokens that is one document.
std::shared_ptr<const ops::MobaPlan> WholeRowPlan(const ops::MobaOptions& options, int64_t kv_heads,
                                                  int64_t length);

// The mask of one row of `length` tokens that is one document.
std::shared_ptr<const ops::BlockMask> WholeRowMask(const ops::AttentionPattern& pattern,
                                                   int64_t kv_heads, int64_t length);

// As BlockMask::Ascii, of one row that is one document: the own blocks, and '+' for what a token
// may choose.
std::string MobaAscii(const ops::MobaPlan& plan, int64_t max_size = 64);
// The row length, at most `length`, in whose picture of `cells` rows a cell is at most one block.
int64_t MobaPictureLength(const ops::MobaOptions& options, int64_t length, int64_t cells);

// The kv heads of each distinct head pattern of a mask: element p lists those with pattern_of == p.
std::vector<std::vector<int64_t>> HeadsByPattern(const ops::BlockMask& mask);

// The row length, at most `length`, whose picture with at most `cells` rows and columns shows the
// pattern best. That is `length` itself, except for patterns with gaps between blocks (S2, power,
// dilated and random blocks): a cell of several of them would nearly always contain a visible one
// and hide the pattern, so there a cell is at most one block of the pattern (64 tokens if that is
// less; of random blocks a tile of mean size), unless the local blocks alone would then fill more
// than half of the picture.
int64_t PictureLength(const ops::AttentionPattern& pattern, int64_t length, int64_t cells);

}  // namespace longspan::launch
