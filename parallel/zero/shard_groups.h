#pragma once
#include <cstdint>
#include <memory>

#include "parallel/comm/communicator.h"

namespace longspan::parallel {

// Among which ranks model state is split. The ranks of a job form groups of `shard_ranks`
// neighbours; each group holds everything once (`inside`), and ranks with the same place in their
// groups hold the same part (`across`). With one group nothing is held twice (ZeRO, arXiv
// 1910.02054); with several, weights travel inside the groups only and gradients of one part
// between them (hybrid sharding, arXiv 2304.11277).
//
// Errors   InvalidArgument for a size that does not divide the number of ranks
// Threads  construction is collective over `world`, which must outlive the groups
class ShardGroups {
 public:
  // `shard_ranks` 0: all ranks of `world`.
  ShardGroups(Communicator& world, int64_t shard_ranks);
  ShardGroups(const ShardGroups&) = delete;
  ShardGroups& operator=(const ShardGroups&) = delete;

  Communicator& inside() { return *inside_; }       // rank = part()
  Communicator* across() { return across_.get(); }  // nullptr: my part is held once
  int part() const { return inside_->rank(); }
  int parts() const { return inside_->size(); }
  int copy() const { return copy_; }  // which of the holders of my part this is
  int copies() const { return copies_; }

 private:
  Communicator* inside_;
  std::unique_ptr<Communicator> owned_, across_;
  int copy_ = 0, copies_ = 1;
};

}  // namespace longspan::parallel
