#pragma once
#include <optional>

#include "parallel/zero/grad_reducer.h"
#include "parallel/zero/shard_reducer.h"
#include "trainer/model/decoder.h"

namespace longspan::trainer {

// The sums over ranks of one step's gradients, under way while backward passes run: of whole
// buckets on every rank, or of each rank's parts where state is sharded.
class GradientExchange {
 public:
  GradientExchange(Context& ctx, parallel::Communicator& world, ParameterStore& store);

  // What the backward pass of a micro-batch is to call; empty when it adds to what stays here.
  BucketHook Pass(bool first, bool last);
  // Waits until OwnedSegment::grad holds the sums. This and all other waits are the trace's
  // "gradient reduction wait".
  void Finish();

 private:
  Context& ctx_;
  ParameterStore& store_;
  std::optional<parallel::GradReducer> whole_;
  std::optional<parallel::ShardReducer> parts_;
};

}  // namespace longspan::trainer
