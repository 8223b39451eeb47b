#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "ops/attention/block_mask.h"

namespace longspan::ops {

// The rows of the BlockMask of a whole micro-batch (all blocks against all blocks), one at a time
// and without keeping them: for planning, which reads every row once and needs no columns. Memory
// is that of one row.
//
// Threads: const functions may run at the same time.
class BlockRowWalk {
 public:
  // Throws InvalidArgument for a pattern with Problems().
  BlockRowWalk(const AttentionPattern& pattern, int64_t kv_heads,
               std::shared_ptr<const Documents> documents);
  ~BlockRowWalk();

  // Heads with equal rules share a pattern, numbered as in BlockMask.
  int64_t patterns() const;
  int32_t pattern_of(int64_t kv_head) const;
  int64_t heads_of(int64_t pattern) const;  // how many kv heads have it

  // Calls visit(block, runs) for query blocks (global ids) in the order given, or for all of them
  // in ascending order. The runs are those of BlockMask::row_runs() and are gone after the call.
  using Visit = std::function<void(int32_t block, std::span<const BlockRun> runs)>;
  void ForEach(int64_t pattern, std::span<const int32_t> blocks, const Visit& visit) const;
  void ForEach(int64_t pattern, const Visit& visit) const;

  // Exact visible (query, key) pairs of one kv head between a query block and what the run holds.
  int64_t Pairs(int64_t pattern, int32_t block, const BlockRun& run) const;

 private:
  struct Data;
  std::unique_ptr<const Data> data_;
};

}  // namespace longspan::ops
