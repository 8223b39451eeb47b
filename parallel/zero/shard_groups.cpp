#include "parallel/zero/shard_groups.h"

#include "ops/core/check.h"

namespace longspan::parallel {

ShardGroups::ShardGroups(Communicator& world, int64_t shard_ranks) : inside_(&world) {
  LONGSPAN_CHECK(shard_ranks == 0 || (shard_ranks > 0 && world.size() % shard_ranks == 0))
      << "ShardGroups: " << world.size() << " ranks do not form groups of " << shard_ranks;
  if (shard_ranks == 0 || shard_ranks == world.size()) return;
  const int size = static_cast<int>(shard_ranks);
  const int group = world.rank() / size, place = world.rank() % size;
  owned_ = world.Split(group, place);
  across_ = world.Split(place, group);
  inside_ = owned_.get();
  copy_ = across_->rank();
  copies_ = across_->size();
}

}  // namespace longspan::parallel
