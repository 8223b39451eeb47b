#pragma once
#include <vector>

#include "ops/core/context.h"
#include "parallel/comm/communicator.h"
#include "parallel/zero/shard_groups.h"

namespace longspan::parallel {

// Sums gradients over all ranks while the backward pass is still running, each rank receiving the
// sum of its own part only: a reduce-scatter inside the group of ranks that share the state, and,
// where several groups hold copies, an all-reduce of the part across them.
//
// A bucket has one or more flat tensors, each cut for the group on its own. Buckets become ready
// last to first in every pass, on all ranks alike. At most one bucket's reduce-scatter is under way
// while the next one's gradients are computed: it is finished when that next bucket is ready, so no
// more than two buckets are held whole. With several passes (micro-batches) a part accumulates from
// pass to pass, and copies are summed after the last one only.
//
// Shapes    whole gradients [slot * parts], parts [slot]; a bucket without tensors costs nothing
// Dtypes    f32 or f64, whole and part alike
// Numerics  one sum over ranks a pass in the communicator's fixed order, passes added in theirs;
//           the holders of a part have the same bits
// Errors    InvalidArgument for shapes and dtypes that do not fit, a bucket out of order, and in
//           Finish for buckets that were never ready in the last pass
// Time      waits are the trace's "gradient reduction wait"
// Threads   one at a time; `ctx` and `groups` must outlive the reducer
class ShardReducer {
 public:
  // `parts[b]`: where the sums of bucket b go.
  ShardReducer(Context& ctx, ShardGroups& groups, std::vector<std::vector<Tensor>> parts);
  // Drops nothing that is under way: waits for it.
  ~ShardReducer();
  ShardReducer(const ShardReducer&) = delete;
  ShardReducer& operator=(const ShardReducer&) = delete;

  int num_buckets() const { return static_cast<int>(parts_.size()); }

  // The backward pass that begins now. `first`: its sums replace what the parts held; `last`: they
  // are complete after it.
  void BeginPass(bool first, bool last);
  // Gradients of this pass, final on this rank. They are kept until their transfer is done and may
  // not be touched before Finish or, if `whole` held the last references, ever.
  void BucketReady(int bucket, std::vector<Tensor> whole);
  // Waits until every part holds its sum, after the last pass.
  void Finish();

 private:
  void Await(std::vector<Work>& works);
  void Settle();  // completes the transfer under way
  void CheckComplete() const;

  Context& ctx_;
  ShardGroups& groups_;
  std::vector<std::vector<Tensor>> parts_;
  bool first_ = true, last_ = true;
  int next_;  // the bucket to become ready next; -1: all were
  // The bucket under way.
  int pending_ = -1;
  std::vector<Tensor> whole_, sums_;
  std::vector<Work> works_;
  std::vector<Work> across_;  // in order of issue
};

}  // namespace longspan::parallel
