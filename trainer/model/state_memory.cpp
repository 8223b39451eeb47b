#include "trainer/model/state_memory.h"

namespace longspan::trainer {

StateMemory::StateMemory(const ModelOptions& model, const StateSharding& sharding,
                         Allocate allocate)
    : compute_(model.compute),
      wide_(AccumulatorOf(model.compute)),
      sharding_(sharding),
      allocate_(std::move(allocate)) {
  for (BucketLayout& layout : LayOutParameters(model, sharding.zero_stage)) {
    if (sharded()) {
      for (const SegmentLayout& s : layout.segments) AllocateParts(s);
    } else {
      const int64_t n = layout.elements, trained = layout.trained_end;
      resident_.push_back(allocate_(n, wide_, MemoryCategory::kParameters));
      if (compute_ != wide_) {
        resident_.push_back(allocate_(n, compute_, MemoryCategory::kParameters));
      }
      resident_.push_back(allocate_(trained, wide_, MemoryCategory::kGradients));
      for (int moment = 0; moment < (sharding_.offload_optimizer ? 0 : 2); ++moment) {
        resident_.push_back(allocate_(trained, wide_, MemoryCategory::kOptimizer));
      }
    }
    buckets_.push_back({std::move(layout), 0, {}, {}});
  }
}

void StateMemory::AllocateParts(const SegmentLayout& s) {
  const parallel::FlatShard cut = CutOf(s);
  const auto take = [&](int64_t elements, DType dtype, MemoryCategory category) {
    resident_.push_back(allocate_(elements, dtype, category));
  };
  take(s.resident ? cut.padded() : cut.slot(), s.narrow ? compute_ : wide_,
       MemoryCategory::kParameters);
  if (s.narrow) take(cut.slot(), wide_, MemoryCategory::kParameters);
  if (!s.trained) return;
  take(cut.slot(), wide_, MemoryCategory::kGradients);
  if (s.keeps_grads) take(cut.padded(), wide_, MemoryCategory::kGradients);
  for (int moment = 0; moment < (sharding_.offload_optimizer ? 0 : 2); ++moment) {
    take(cut.slot(), wide_, MemoryCategory::kOptimizer);
  }
}

void StateMemory::Prefetch(size_t bucket) {
  State& b = buckets_[bucket];
  if (!b.whole.empty()) return;
  for (const SegmentLayout& s : b.layout.segments) {
    if (s.resident) continue;
    b.whole.push_back(
        allocate_(CutOf(s).padded(), s.narrow ? compute_ : wide_, MemoryCategory::kParameters));
  }
}

void StateMemory::Hold(size_t bucket, std::optional<size_t> next) {
  Prefetch(bucket);
  if (next.has_value()) Prefetch(*next);
  ++buckets_[bucket].holds;
}

void StateMemory::Drop(size_t bucket) {
  State& b = buckets_[bucket];
  if (--b.holds == 0) b.whole.clear();
}

void StateMemory::OpenGrads(size_t bucket) {
  State& b = buckets_[bucket];
  if (!b.whole_grads.empty()) return;
  for (const SegmentLayout& s : b.layout.segments) {
    if (!s.trained || s.keeps_grads) continue;
    b.whole_grads.push_back(allocate_(CutOf(s).padded(), wide_, MemoryCategory::kGradients));
  }
}

void StateMemory::BucketReady(size_t bucket) {
  if (!sharded()) return;
  State& b = buckets_[bucket];
  pending_ = std::move(b.whole_grads);
  b.whole_grads.clear();
  if (!sharding_.accumulates || pending_.empty()) return;
  for (const SegmentLayout& s : b.layout.segments) {
    if (!s.trained) continue;
    pending_.push_back(allocate_(CutOf(s).slot(), wide_, MemoryCategory::kGradients));
  }
}

}  // namespace longspan::trainer
