#include "parallel/zero/shard_reducer.h"

#include <glog/logging.h>

#include <exception>

#include "ops/elementwise/elementwise.h"

namespace longspan::parallel {

ShardReducer::ShardReducer(Context& ctx, ShardGroups& groups,
                           std::vector<std::vector<Tensor>> parts)
    : ctx_(ctx), groups_(groups), parts_(std::move(parts)), next_(num_buckets() - 1) {
  for (size_t b = 0; b < parts_.size(); ++b) {
    for (const Tensor& part : parts_[b]) {
      const bool fits = part.defined() && part.rank() == 1 &&
                        (part.dtype() == DType::kF32 || part.dtype() == DType::kF64);
      LONGSPAN_CHECK(fits) << "ShardReducer: a part of bucket " << b << " is " << part.Describe()
                           << " instead of a flat f32 or f64 tensor";
    }
  }
}

ShardReducer::~ShardReducer() {
  try {
    for (Work& work : works_) work.Wait();
    for (Work& work : across_) work.Wait();
  } catch (const std::exception& e) {  // what ends the step is thrown already
    LOG(ERROR) << "a sum of gradients failed: " << e.what();
  }
}

void ShardReducer::CheckComplete() const {
  LONGSPAN_CHECK(next_ < 0) << "ShardReducer: bucket " << next_
                            << " was never made ready, so its gradient was not summed";
}

void ShardReducer::BeginPass(bool first, bool last) {
  if (!first) CheckComplete();
  Settle();  // of the pass before
  first_ = first;
  last_ = last;
  next_ = num_buckets() - 1;
}

void ShardReducer::BucketReady(int bucket, std::vector<Tensor> whole) {
  LONGSPAN_CHECK(bucket == next_ && bucket >= 0)
      << "ShardReducer: bucket " << bucket << " is ready where "
      << (next_ < 0 ? std::string("none is expected") : Str("bucket ", next_, " is expected"));
  const std::vector<Tensor>& parts = parts_[static_cast<size_t>(bucket)];
  bool fits = whole.size() == parts.size();
  for (size_t i = 0; fits && i < whole.size(); ++i) {
    fits = whole[i].defined() && whole[i].dtype() == parts[i].dtype() &&
           whole[i].shape() == Shape({parts[i].dim(0) * groups_.parts()});
  }
  LONGSPAN_CHECK(fits) << "ShardReducer: the gradients of bucket " << bucket
                       << " do not fit its parts";
  Settle();
  --next_;
  if (whole.empty()) return;
  pending_ = bucket;
  whole_ = std::move(whole);
  for (size_t i = 0; i < parts.size(); ++i) {
    const MemoryScope scope(ctx_.allocator(), MemoryCategory::kGradients);
    sums_.push_back(first_ ? parts[i] : ctx_.Empty(parts[i].shape(), parts[i].dtype()));
    works_.push_back(parts[i].numel() > 0 ? groups_.inside().ReduceScatter(whole_[i], sums_[i])
                                          : Work());
  }
}

void ShardReducer::Await(std::vector<Work>& works) {
  const TraceScope scope(ctx_.trace(), "gradient reduction wait");
  for (Work& work : works) work.Wait();
  works.clear();
}

void ShardReducer::Settle() {
  if (pending_ < 0) return;
  Await(works_);
  whole_.clear();
  const std::vector<Tensor>& parts = parts_[static_cast<size_t>(pending_)];
  for (size_t i = 0; i < parts.size(); ++i) {
    Tensor part = parts[i];
    if (!first_) ops::AddInto(ctx_, part, sums_[i]);
    if (last_ && groups_.across() != nullptr && part.numel() > 0) {
      across_.push_back(groups_.across()->AllReduce(part, ReduceOp::kSum));
    }
  }
  sums_.clear();
  pending_ = -1;
}

void ShardReducer::Finish() {
  CheckComplete();
  Settle();
  Await(across_);
}

}  // namespace longspan::parallel
