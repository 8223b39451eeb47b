#include <algorithm>

#include "ops/core/cuda/backend.h"
#include "ops/core/parallel_for.h"
#include "ops/core/rng.h"
#include "ops/elementwise/elementwise.h"
#include "parallel/zero/flat_shard.h"
#include "trainer/model/parameters.h"

namespace longspan::trainer {
namespace {

// Elements [first, first + weights.numel()) of a parameter's first value, flattened.
void InitializeRange(Context& ctx, const ParameterSpec& p, uint64_t seed, int64_t first,
                     const Tensor& weights) {
  const Philox rng(seed, StreamOf(p.name.c_str()));
  DispatchFloat(weights.dtype(), "Initialize", [&]<class T>() {
    if constexpr (!std::is_same_v<T, BF16>) {
      // Always computed on the host, so that all devices start from the same bits.
      const bool direct = ctx.device().kind == DeviceKind::kCpu;
      std::vector<T> staged(direct ? 0 : static_cast<size_t>(weights.numel()));
      T* out = direct ? weights.data<T>() : staged.data();
      ParallelRanges(ctx, weights.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          // Rounded to f32 in every mode, so that F32 and F64 runs start from the same weights.
          out[j] = p.init_std == 0
                       ? T(1)
                       : static_cast<T>(static_cast<float>(
                             p.init_std * rng.Normal(static_cast<uint64_t>(first + j))));
        }
      });
      if (!direct) weights.WriteFrom(staged.data());
    }
  });
}

}  // namespace

ParameterStore::ParameterStore(Context& ctx, const ModelOptions& options, const StoreOptions& store)
    : ctx_(ctx), compute_(options.compute), groups_(store.zero_stage > 0 ? store.groups : nullptr) {
  LONGSPAN_CHECK(store.zero_stage == 0 || store.groups != nullptr)
      << "ParameterStore: ZeRO stage " << store.zero_stage << " without groups of ranks";
  if (store.offload_optimizer) {
    LONGSPAN_CHECK(ctx.runtime() != nullptr)
        << "ParameterStore: the optimizer's state is in host memory already on "
        << ToString(ctx.device());
    offloaded_ = std::make_shared<Allocator>(false, cuda::MappedHostMemory(ctx.runtime()));
  }
  const DType wide = AccumulatorOf(options.compute);
  for (BucketLayout& layout : LayOutParameters(options, store.zero_stage)) {
    buckets_.emplace_back();
    Bucket& b = buckets_.back();
    static_cast<BucketLayout&>(b) = std::move(layout);
    for (const ParameterSpec& p : b.specs) b.parameters.push_back({p.name, {}, {}});
    for (const SegmentLayout& s : b.segments) {
      OwnedSegment owned;
      owned.layout = s;
      b.owned.push_back(std::move(owned));
    }
    sharded() ? AllocateParts(b, wide, store) : AllocateWhole(b, wide, store);
    total_ += b.elements;
  }
  holds_.assign(buckets_.size(), 0);
}

Tensor ParameterStore::Moments(int64_t elements, DType dtype) {
  if (offloaded_ == nullptr) {
    const MemoryScope scope(ctx_.allocator(), MemoryCategory::kOptimizer);
    return ctx_.Zeros({elements}, dtype);
  }
  const size_t bytes = static_cast<size_t>(elements) * SizeOf(dtype);
  const Tensor t(std::make_shared<Storage>(offloaded_, bytes), 0, {elements}, dtype, ctx_.device());
  offloaded_->source().Fill(t.raw(), 0, bytes);
  return t;
}

// The views of a segment's parameters into `whole`, which holds all of it.
void ParameterStore::Bind(Bucket& bucket, const OwnedSegment& segment, const Tensor& whole,
                          Tensor autograd::Parameter::*tensor) {
  for (size_t i = 0; i < bucket.specs.size(); ++i) {
    const int64_t begin = bucket.offsets[i] - segment.layout.begin;
    if (begin < 0 || bucket.offsets[i] >= segment.layout.end) continue;
    const Shape& shape = bucket.specs[i].shape;
    bucket.parameters[i].*tensor =
        whole.defined() ? whole.Rows(begin, begin + shape.numel()).Reshape(shape) : Tensor();
  }
}

void ParameterStore::AllocateWhole(Bucket& b, DType wide, const StoreOptions& store) {
  const auto zeros = [&](MemoryCategory category, int64_t elements, DType dtype) {
    const MemoryScope scope(ctx_.allocator(), category);
    return ctx_.Zeros({elements}, dtype);
  };
  b.master = zeros(MemoryCategory::kParameters, b.elements, wide);
  b.value = compute_ == wide ? b.master : zeros(MemoryCategory::kParameters, b.elements, compute_);
  if (store.training) {
    b.grad = zeros(MemoryCategory::kGradients, b.trained_end, wide);
    b.m = Moments(b.trained_end, wide);
    b.v = Moments(b.trained_end, wide);
  }
  for (OwnedSegment& s : b.owned) {
    s.begin = s.layout.begin;
    s.end = s.layout.end;
    s.master = b.master.Rows(s.begin, s.end);
    if (s.layout.narrow) s.value = b.value.Rows(s.begin, s.end);
    if (!store.training || !s.layout.trained) continue;
    s.grad = b.grad.Rows(s.begin, s.end);
    s.m = b.m.Rows(s.begin, s.end);
    s.v = b.v.Rows(s.begin, s.end);
    Bind(b, s, s.grad, &autograd::Parameter::grad);
  }
  for (size_t i = 0; i < b.specs.size(); ++i) {
    const ParameterSpec& p = b.specs[i];
    const int64_t begin = b.offsets[i], end = begin + p.shape.numel();
    const Tensor& source = p.init_std == 0 ? b.master : b.value;
    b.parameters[i].value = source.Rows(begin, end).Reshape(p.shape);
    b.parameters[i].trained = b.parameters[i].grad.defined();
  }
}

void ParameterStore::AllocateParts(Bucket& b, DType wide, const StoreOptions& store) {
  for (OwnedSegment& s : b.owned) {
    const parallel::FlatShard cut{s.layout.end - s.layout.begin, groups_->parts()};
    s.begin = s.layout.begin + cut.begin(groups_->part());
    s.end = s.layout.begin + cut.end(groups_->part());
    {
      const MemoryScope scope(ctx_.allocator(), MemoryCategory::kParameters);
      s.gather = std::make_unique<parallel::ShardGather>(ctx_, groups_->inside(), cut.slot(),
                                                         s.layout.narrow ? compute_ : wide,
                                                         s.layout.resident);
      s.master = s.layout.narrow ? ctx_.Zeros({cut.slot()}, wide) : s.gather->shard();
    }
    if (s.layout.narrow) s.value = s.gather->shard();
    if (s.layout.resident) {
      Bind(b, s, s.gather->Wait(), &autograd::Parameter::value);
    }
    if (!store.training || !s.layout.trained) continue;
    {
      const MemoryScope scope(ctx_.allocator(), MemoryCategory::kGradients);
      s.grad = ctx_.Zeros({cut.slot()}, wide);
      if (s.layout.keeps_grads) s.whole_grad = ctx_.Zeros({cut.padded()}, wide);
    }
    s.m = Moments(cut.slot(), wide);
    s.v = Moments(cut.slot(), wide);
    keeps_grads_ = keeps_grads_ && s.layout.keeps_grads;
    if (s.layout.keeps_grads) Bind(b, s, s.whole_grad, &autograd::Parameter::grad);
    for (size_t i = 0; i < b.specs.size(); ++i) {
      if (b.offsets[i] >= s.layout.begin && b.offsets[i] < s.layout.end) {
        b.parameters[i].trained = true;
      }
    }
  }
}

const autograd::Parameter& ParameterStore::Find(const std::string& name) const {
  for (const Bucket& b : buckets_) {
    for (const autograd::Parameter& p : b.parameters) {
      if (p.name == name) return p;
    }
  }
  throw InvalidArgument("no parameter is called " + name);
}

ParameterStore::Part ParameterStore::PartOf(const Bucket& bucket, size_t spec,
                                            Tensor OwnedSegment::*tensor) {
  const int64_t first = bucket.offsets[spec], last = first + bucket.specs[spec].shape.numel();
  for (const OwnedSegment& s : bucket.owned) {
    if (first < s.layout.begin || first >= s.layout.end) continue;
    if (!(s.*tensor).defined()) return {};
    const int64_t begin = std::clamp(s.begin, first, last), end = std::clamp(s.end, begin, last);
    if (begin == end) return {(s.*tensor).Rows(0, 0), 0};
    return {(s.*tensor).Rows(begin - s.begin, end - s.begin), begin - first};
  }
  throw InvalidArgument(Str("ParameterStore: parameter ", spec, " of ", bucket.name));
}

void ParameterStore::Initialize(uint64_t seed) {
  for (const Bucket& b : buckets_) {
    for (size_t i = 0; i < b.specs.size(); ++i) {
      const Part part = PartOf(b, i, &OwnedSegment::master);
      InitializeRange(ctx_, b.specs[i], seed, part.begin, part.elements);
    }
  }
  RefreshValues();
}

void ParameterStore::RefreshValues() {
  for (Bucket& b : buckets_) {
    for (OwnedSegment& s : b.owned) {
      if (s.value.defined()) ops::CastInto(ctx_, s.master, s.value);
    }
  }
  for (size_t b = 0; b < buckets_.size(); ++b) {
    for (OwnedSegment& s : buckets_[b].owned) {
      if (s.gather == nullptr || !s.layout.resident) continue;
      s.gather->Start();
      s.gather->Wait();
    }
  }
}

void ParameterStore::ZeroGrads() {
  for (Bucket& b : buckets_) {
    if (b.grad.defined()) ctx_.SetZero(b.grad);
    for (OwnedSegment& s : b.owned) {
      if (s.whole_grad.defined()) ctx_.SetZero(s.whole_grad);
    }
  }
}

void ParameterStore::Prefetch(size_t bucket) {
  for (OwnedSegment& s : buckets_[bucket].owned) {
    if (s.gather != nullptr && !s.gather->started()) s.gather->Start();
  }
}

void ParameterStore::Hold(size_t bucket, std::optional<size_t> next) {
  if (!sharded()) return;
  Prefetch(bucket);
  if (next.has_value()) Prefetch(*next);
  ++holds_[bucket];
  TraceScope scope(ctx_.trace(), "parameter gather wait");
  for (OwnedSegment& s : buckets_[bucket].owned) {
    const Tensor& whole = s.gather->Wait();
    if (!s.layout.resident) Bind(buckets_[bucket], s, whole, &autograd::Parameter::value);
  }
}

void ParameterStore::Drop(size_t bucket) {
  if (!sharded()) return;
  LONGSPAN_CHECK(holds_[bucket] > 0)
      << "ParameterStore: " << buckets_[bucket].name << " is dropped and was not held";
  if (--holds_[bucket] > 0) return;
  for (OwnedSegment& s : buckets_[bucket].owned) {
    if (s.layout.resident) continue;
    Bind(buckets_[bucket], s, Tensor(), &autograd::Parameter::value);
    s.gather->Drop();
  }
}

void ParameterStore::OpenGrads(size_t bucket) {
  for (OwnedSegment& s : buckets_[bucket].owned) {
    if (s.gather == nullptr || !s.grad.defined() || s.whole_grad.defined()) continue;
    {
      const MemoryScope scope(ctx_.allocator(), MemoryCategory::kGradients);
      s.whole_grad = ctx_.Zeros({s.grad.dim(0) * groups_->parts()}, s.grad.dtype());
    }
    Bind(buckets_[bucket], s, s.whole_grad, &autograd::Parameter::grad);
  }
}

std::vector<Tensor> ParameterStore::TakeGrads(size_t bucket) {
  std::vector<Tensor> grads;
  for (OwnedSegment& s : buckets_[bucket].owned) {
    if (!s.grad.defined()) continue;
    LONGSPAN_CHECK(s.whole_grad.defined())
        << "ParameterStore: no gradients of " << buckets_[bucket].name << " have been opened";
    grads.push_back(s.whole_grad);
    if (s.layout.keeps_grads) continue;
    Bind(buckets_[bucket], s, Tensor(), &autograd::Parameter::grad);
    s.whole_grad = Tensor();
  }
  return grads;
}

std::vector<std::vector<Tensor>> ParameterStore::GradParts() const {
  std::vector<std::vector<Tensor>> parts;
  for (const Bucket& b : buckets_) {
    parts.emplace_back();
    for (const OwnedSegment& s : b.owned) {
      if (s.grad.defined()) parts.back().push_back(s.grad);
    }
  }
  return parts;
}

void ParameterStore::Publish(size_t bucket) {
  for (OwnedSegment& s : buckets_[bucket].owned) {
    if (s.gather != nullptr && s.layout.trained && s.layout.resident) s.gather->Start();
  }
}

int64_t ParameterStore::PublishedBytes() const {
  int64_t bytes = 0;
  for (const Bucket& b : buckets_) {
    for (const OwnedSegment& s : b.owned) {
      if (s.gather == nullptr || !s.layout.trained || !s.layout.resident) continue;
      bytes += (groups_->parts() - 1) * static_cast<int64_t>(s.gather->shard().bytes());
    }
  }
  return bytes;
}

}  // namespace longspan::trainer
