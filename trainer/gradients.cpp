#include "trainer/gradients.h"

namespace longspan::trainer {

GradientExchange::GradientExchange(Context& ctx, parallel::Communicator& world,
                                   ParameterStore& store)
    : ctx_(ctx), store_(store) {
  if (store.sharded()) {
    parts_.emplace(ctx, *store.groups(), store.GradParts());
    return;
  }
  std::vector<Tensor> buckets;
  for (const Bucket& b : store.buckets()) buckets.push_back(b.grad);
  whole_.emplace(world, std::move(buckets));
}

BucketHook GradientExchange::Pass(bool first, bool last) {
  const bool once = whole_.has_value() || store_.keeps_grads();
  if (once && !last) return {};
  if (whole_.has_value()) {
    return [this](size_t bucket) { whole_->BucketReady(static_cast<int>(bucket)); };
  }
  parts_->BeginPass(once || first, last);
  return [this](size_t bucket) {
    parts_->BucketReady(static_cast<int>(bucket), store_.TakeGrads(bucket));
  };
}

void GradientExchange::Finish() {
  if (whole_.has_value()) {
    const TraceScope scope(ctx_.trace(), "gradient reduction wait");
    whole_->Finish();
  } else {
    parts_->Finish();
  }
}

}  // namespace longspan::trainer
