#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "ops/core/allocator.h"
#include "parallel/zero/flat_shard.h"
#include "trainer/model/memory.h"
#include "trainer/model/parameters.h"

namespace longspan::trainer {

// The memory that a ParameterStore and a GradientExchange take, call by call, without the numbers.
class StateMemory {
 public:
  using Block = std::shared_ptr<const void>;
  using Allocate = std::function<Block(int64_t elements, DType dtype, MemoryCategory category)>;

  // Takes what is there all the time, until the end of this object.
  StateMemory(const ModelOptions& model, const StateSharding& sharding, Allocate allocate);

  bool sharded() const { return sharding_.zero_stage > 0; }
  void Hold(size_t bucket, std::optional<size_t> next);
  void Prefetch(size_t bucket);
  void Drop(size_t bucket);
  void OpenGrads(size_t bucket);
  void BucketReady(size_t bucket);  // ShardReducer's, of gradients that are not kept

 private:
  struct State {
    BucketLayout layout;
    int holds = 0;
    std::vector<Block> whole, whole_grads;  // while they are there
  };
  void AllocateParts(const SegmentLayout& segment);
  parallel::FlatShard CutOf(const SegmentLayout& segment) const {
    return {segment.end - segment.begin, sharding_.parts};
  }

  const DType compute_, wide_;
  const StateSharding sharding_;
  const Allocate allocate_;
  std::vector<State> buckets_;
  std::vector<Block> resident_, pending_;
};

}  // namespace longspan::trainer
