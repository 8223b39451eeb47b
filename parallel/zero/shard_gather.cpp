#include "parallel/zero/shard_gather.h"

#include <glog/logging.h>

#include <exception>

namespace longspan::parallel {

ShardGather::ShardGather(Context& ctx, Communicator& group, int64_t slot, DType dtype,
                         bool resident)
    : ctx_(ctx), group_(group), resident_(resident) {
  LONGSPAN_CHECK(slot >= 0) << "ShardGather: a slot of " << slot << " elements";
  if (resident) {
    whole_ = ctx.Zeros({slot * group.size()}, dtype);
    shard_ = whole_.Rows(slot * group.rank(), slot * (group.rank() + 1));
  } else {
    shard_ = ctx.Zeros({slot}, dtype);
  }
}

ShardGather::~ShardGather() {
  try {
    work_.Wait();
  } catch (const std::exception& e) {  // the next operation of the group tells it to everybody
    LOG(ERROR) << "a transfer of parameters failed: " << e.what();
  }
}

void ShardGather::Start() {
  work_.Wait();
  if (!whole_.defined()) {
    const MemoryScope scope(ctx_.allocator(), MemoryCategory::kParameters);
    whole_ = ctx_.Empty({shard_.dim(0) * group_.size()}, shard_.dtype());
  }
  if (shard_.numel() > 0) work_ = group_.AllGather(shard_, whole_);
}

const Tensor& ShardGather::Wait() {
  LONGSPAN_CHECK(whole_.defined()) << "ShardGather: waited for what nobody has started";
  work_.Wait();
  return whole_;
}

void ShardGather::Drop() {
  if (resident_) return;
  work_.Wait();
  whole_ = Tensor();
}

}  // namespace longspan::parallel
