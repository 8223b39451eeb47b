#pragma once
#include "ops/core/context.h"
#include "parallel/comm/communicator.h"

namespace longspan::parallel {

// A flat tensor of which every rank of a group owns a slot, and which all of them can have whole:
// for good (resident), or from Start to Drop.
//
// Shapes    shard [slot], whole [slot * group size]
// Dtypes    any
// Errors    InvalidArgument for asking for what is not there; CommError of the transfer
// Threads   one at a time; Start is collective over `group`, which must outlive this
class ShardGather {
 public:
  // The shard starts undefined in value; memory is of `ctx` in its present category.
  ShardGather(Context& ctx, Communicator& group, int64_t slot, DType dtype, bool resident);
  ~ShardGather();
  ShardGather(const ShardGather&) = delete;
  ShardGather& operator=(const ShardGather&) = delete;

  bool resident() const { return resident_; }
  // This rank's elements; of a resident one the view of the whole. Not to be written while a
  // transfer is under way.
  const Tensor& shard() const { return shard_; }
  // Begins to collect what the shards hold now. Waits for an earlier transfer.
  void Start();
  // Whether there is a whole, or will be after Wait.
  bool started() const { return whole_.defined(); }
  // The whole of what was collected last.
  const Tensor& Wait();
  // Lets go of the whole unless it is resident; waits for a transfer under way.
  void Drop();

 private:
  Context& ctx_;
  Communicator& group_;
  const bool resident_;
  Tensor shard_, whole_;
  Work work_;
};

}  // namespace longspan::parallel
