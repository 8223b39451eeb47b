#include "parallel/zero/grad_reducer.h"

#include <algorithm>

#include "parallel/comm/arguments.h"

namespace longspan::parallel {

GradReducer::GradReducer(Communicator& comm, std::vector<Tensor> buckets)
    : comm_(&comm),
      buckets_(std::move(buckets)),
      ready_(buckets_.size(), 0),
      next_(static_cast<int>(buckets_.size()) - 1) {
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const Tensor& bucket = buckets_[i];
    const bool fits = bucket.defined() && bucket.rank() == 1 &&
                      (bucket.dtype() == DType::kF32 || bucket.dtype() == DType::kF64);
    LONGSPAN_CHECK(fits) << "GradReducer: bucket " << i << " is " << bucket.Describe()
                         << " instead of a flat f32 or f64 tensor";
  }
}

void GradReducer::BucketReady(int i) {
  LONGSPAN_CHECK(i >= 0 && i < num_buckets())
      << "GradReducer: bucket " << i << " of " << num_buckets();
  LONGSPAN_CHECK(!ready_[static_cast<size_t>(i)])
      << "GradReducer: bucket " << i << " was made ready twice in one step";
  ready_[static_cast<size_t>(i)] = 1;
  IssueReady();
}

void GradReducer::IssueReady() {
  for (; next_ >= 0 && ready_[static_cast<size_t>(next_)]; --next_) {
    const Tensor& bucket = buckets_[static_cast<size_t>(next_)];
    if (bucket.numel() > 0) works_.push_back(comm_->AllReduce(bucket, ReduceOp::kSum));
  }
}

void GradReducer::Finish() {
  const int missing = next_;
  for (Work& work : works_) work.Wait();
  works_.clear();
  std::fill(ready_.begin(), ready_.end(), 0);
  next_ = num_buckets() - 1;
  LONGSPAN_CHECK(missing < 0) << "GradReducer: bucket " << missing
                              << " was never made ready, so its gradient was not summed";
}

std::vector<double> GradReducer::SumScalars(const std::vector<double>& values) {
  if (values.empty()) return {};
  Tensor t = internal::HostTensor({static_cast<int64_t>(values.size())}, DType::kF64);
  std::copy(values.begin(), values.end(), t.data<double>());
  comm_->AllReduce(t, ReduceOp::kSum).Wait();
  return std::vector<double>(t.data<double>(), t.data<double>() + values.size());
}

}  // namespace longspan::parallel
