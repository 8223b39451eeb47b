#pragma once
#include <cstdint>
#include <vector>

#include "ops/attention/block_mask.h"

namespace longspan::ops {

// One independent piece of work: a query (or key) block of one kv head.
struct BlockTask {
  int32_t index;  // row of row_runs() or column_runs()
  int32_t kv_head;
};
// All pieces along one axis, those with most entries first.
std::vector<BlockTask> TasksByCost(const BlockMask& mask, const BlockRuns& runs);
// The same, roughly, for a few threads with large caches: pieces of one kv head follow each other
// where the larger has less than twice the entries of the smaller, because they read the same
// blocks.
std::vector<BlockTask> TasksByCostAndHead(const BlockMask& mask, const BlockRuns& runs);

// Place in `list` by global block id, -1 where absent.
std::vector<int32_t> IndexByBlock(const Documents& documents, const BlockList& list);

// Local token offset in mask.queries() by global block id, -1 where absent.
std::vector<int64_t> QueryTokenOffsets(const BlockMask& mask);

}  // namespace longspan::ops
