#include "trainer/batch.h"

#include <cstring>

#include "ops/core/cuda/backend.h"

namespace longspan::trainer {
namespace {

constexpr size_t kCachedLayouts = 4;

template <class T>
Tensor ToTensor(Context& ctx, const std::vector<T>& values) {
  Tensor t = ctx.Empty({static_cast<int64_t>(values.size())}, DTypeOf<T>());
  if (!values.empty()) std::memcpy(t.raw(), values.data(), t.bytes());
  return t;
}

// Kernels on a GPU cannot say which token was wrong. Datasets are checked when they are opened, so
// this finds what changed afterwards.
void CheckRange(const std::vector<int32_t>& values, int32_t smallest, int64_t vocab_size,
                const char* what) {
  for (const int32_t value : values) {
    if (value >= smallest && value < vocab_size) continue;
    throw DataError(
        Str("the training or validation data give the ", what, " ", value, ", which is outside [",
            smallest, ", ", vocab_size,
            ") of model.vocab_size; the dataset's .bin file has changed since it was opened"));
  }
}

Tensor OnDevice(Context& ctx, const Tensor& host) {
  Tensor t = ctx.Empty(host.shape(), host.dtype());
  if (host.bytes() > 0) t.WriteFrom(host.raw());
  return t;
}

}  // namespace

LocalBatch ToDevice(Context& ctx, const LocalBatch& host) {
  if (ctx.device().kind == DeviceKind::kCpu) return host;
  const MemoryScope scope(ctx.allocator(), MemoryCategory::kStaging);
  size_t bytes = 0;  // the RoPE table of a long batch is most of it
  for (const Tensor* t : {&host.ids, &host.labels, &host.order.tokens, &host.order.pieces,
                          &host.order.joins, &host.rope.cos, &host.rope.sin}) {
    bytes += t->bytes();
  }
  cuda::ReserveUploads(ctx.cuda(), bytes);
  LocalBatch device = host;
  device.ids = OnDevice(ctx, host.ids);
  device.labels = OnDevice(ctx, host.labels);
  for (Tensor* t : {&device.order.tokens, &device.order.pieces, &device.order.joins}) {
    *t = OnDevice(ctx, *t);
  }
  device.rope = {OnDevice(ctx, host.rope.cos), OnDevice(ctx, host.rope.sin)};
  return device;
}

BatchBuilder::BatchBuilder(const ModelOptions& model, parallel::Placement placement,
                           parallel::StrategyOptions strategy, int cp_rank)
    : model_(model),
      placement_(std::make_shared<const parallel::Placement>(std::move(placement))),
      strategy_(strategy),
      cp_rank_(cp_rank),
      ctx_(ContextOptions{.threads = 1}) {
  strategy_.heads = model.num_heads;
  for (const MixerOptions& mixer : model_.mixers) {
    LONGSPAN_CHECK(!(mixer.moba || mixer.seer) || placement_->ranks() == 1)
        << "mixer " << mixer.name << " is routed, which is not built for context parallelism";
    LONGSPAN_CHECK(!(mixer.moba || mixer.seer || mixer.duo) || !mixer.IsSigmoid())
        << "mixer " << mixer.name << " is built for softmax only";
  }
}

std::shared_ptr<PreparedBatch> BatchBuilder::Build(const data::MicroBatch& batch) {
  LONGSPAN_CHECK(batch.rows == placement_->rows() && batch.row_length == placement_->row_length());
  const TraceScope scope(ctx_.trace(), "prepare batch");
  CheckRange(batch.tokens, 0, model_.vocab_size, "token id");
  CheckRange(batch.labels, -1, model_.vocab_size, "label");
  auto prepared = std::make_shared<PreparedBatch>();
  LocalBatch& local = prepared->local;
  local.ids = ToTensor(ctx_, placement_->Slice(batch.tokens, cp_rank_));
  local.labels = ToTensor(ctx_, placement_->Slice(batch.labels, cp_rank_));
  local.order = ops::OrderTokens(ctx_, local.ids, model_.vocab_size);
  local.rope = ops::MakeRopeTable(ctx_, ToTensor(ctx_, placement_->Slice(batch.positions, cp_rank_)),
                                  {.theta = model_.rope_theta, .head_dim = model_.head_dim},
                                  AccumulatorOf(model_.compute));
  const Plans plans = PlansFor(std::make_shared<const ops::Documents>(
      ops::Documents::FromEnds(batch.row_length, batch.doc_ends)));
  local.plans = plans.per_mixer;
  local.stream_plans = plans.stream_per_mixer;
  local.seer_plans = plans.seer_per_mixer;
  local.moba_plans = plans.moba_per_mixer;
  prepared->attention_pairs = plans.attention_pairs;
  prepared->open_pairs = plans.open_pairs;
  return prepared;
}

BatchBuilder::Plans BatchBuilder::PlansFor(std::shared_ptr<const ops::Documents> documents) {
  for (const Plans& plans : cache_) {
    if (*plans.documents == *documents) return plans;
  }
  Plans plans{documents, {}, {}, {}, {}, 0, 0};
  std::vector<double> open_pairs, stream_pairs, kept;
  const double group = static_cast<double>(model_.num_heads / model_.num_kv_heads);
  const auto plan = [&](const ops::AttentionPattern& pattern) {
    return parallel::MakePlan(pattern, model_.num_kv_heads, documents, placement_, strategy_,
                              cp_rank_);
  };
  const auto pairs_of = [group](const std::shared_ptr<const parallel::AttentionPlan>& p) {
    return p == nullptr ? 0.0 : group * static_cast<double>(p->VisiblePairs());
  };
  for (const MixerOptions& mixer : model_.mixers) {
    plans.per_mixer.push_back(mixer.moba ? nullptr : plan(mixer.pattern));
    plans.stream_per_mixer.push_back(mixer.duo ? plan(mixer.duo->Stream()) : nullptr);
    plans.moba_per_mixer.push_back(
        mixer.moba ? ops::MobaPlan::Build(*mixer.moba, model_.num_kv_heads, documents) : nullptr);
    open_pairs.push_back(
        mixer.moba
            ? static_cast<double>(model_.num_heads * plans.moba_per_mixer.back()->NominalPairs())
            : pairs_of(plans.per_mixer.back()));
    stream_pairs.push_back(pairs_of(plans.stream_per_mixer.back()));
    plans.seer_per_mixer.push_back(mixer.seer ? MakeSeerPlan(ctx_, model_, *mixer.seer, *documents)
                                              : nullptr);
    kept.push_back(mixer.seer ? plans.seer_per_mixer.back()->KeptShare(mixer.seer->selection)
                              : 1.0);
  }
  for (int layer : model_.layers) {
    const auto mixer = static_cast<size_t>(layer);
    plans.open_pairs += open_pairs[mixer];
    plans.attention_pairs += kept[mixer] * open_pairs[mixer] + stream_pairs[mixer];
  }
  cache_.push_front(plans);
  if (cache_.size() > kCachedLayouts) cache_.pop_back();
  return plans;
}

}  // namespace longspan::trainer
