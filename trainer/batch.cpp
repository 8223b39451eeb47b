#include "trainer/batch.h"

#include <cstring>

namespace longspan::trainer {
namespace {

constexpr size_t kCachedLayouts = 4;

template <class T>
Tensor ToTensor(Context& ctx, const std::vector<T>& values) {
  Tensor t = ctx.Empty({static_cast<int64_t>(values.size())}, DTypeOf<T>());
  if (!values.empty()) std::memcpy(t.raw(), values.data(), t.bytes());
  return t;
}

}  // namespace

BatchBuilder::BatchBuilder(const ModelOptions& model, parallel::Placement placement,
                           parallel::StrategyKind strategy, int cp_rank)
    : model_(model),
      placement_(std::move(placement)),
      strategy_(strategy),
      cp_rank_(cp_rank),
      ctx_(ContextOptions{.threads = 1}) {}

std::shared_ptr<PreparedBatch> BatchBuilder::Build(const data::MicroBatch& batch) {
  LONGSPAN_CHECK(batch.rows == placement_.rows() && batch.row_length == placement_.row_length());
  auto prepared = std::make_shared<PreparedBatch>();
  LocalBatch& local = prepared->local;
  local.ids = ToTensor(ctx_, placement_.Slice(batch.tokens, cp_rank_));
  local.labels = ToTensor(ctx_, placement_.Slice(batch.labels, cp_rank_));
  local.rope = ops::MakeRopeTable(ctx_, ToTensor(ctx_, placement_.Slice(batch.positions, cp_rank_)),
                                  {.theta = model_.rope_theta, .head_dim = model_.head_dim},
                                  AccumulatorOf(model_.compute));
  const Plans plans = PlansFor(std::make_shared<const ops::Documents>(
      ops::Documents::FromEnds(batch.row_length, batch.doc_ends)));
  local.plans = plans.per_mixer;
  prepared->attention_pairs = plans.attention_pairs;
  return prepared;
}

BatchBuilder::Plans BatchBuilder::PlansFor(std::shared_ptr<const ops::Documents> documents) {
  for (const Plans& plans : cache_) {
    if (*plans.documents == *documents) return plans;
  }
  Plans plans{documents, {}, 0};
  std::vector<double> pairs;
  const double group = static_cast<double>(model_.num_heads / model_.num_kv_heads);
  for (const MixerOptions& mixer : model_.mixers) {
    plans.per_mixer.push_back(parallel::MakePlan(mixer.pattern, model_.num_kv_heads, documents,
                                                 placement_, strategy_, cp_rank_));
    pairs.push_back(group * static_cast<double>(plans.per_mixer.back()->VisiblePairs()));
  }
  for (int layer : model_.layers) plans.attention_pairs += pairs[static_cast<size_t>(layer)];
  cache_.push_front(plans);
  if (cache_.size() > kCachedLayouts) cache_.pop_back();
  return plans;
}

}  // namespace longspan::trainer
