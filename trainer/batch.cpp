#include "trainer/batch.h"

#include <chrono>
#include <cstring>

#include "ops/core/cuda/backend.h"

namespace longspan::trainer {
namespace {

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

BatchBuilder::BatchBuilder(const ModelOptions& model, const ContextLayout& layout, int cp_rank)
    : model_(model),
      planner_(model, layout, cp_rank),
      cp_rank_(cp_rank),
      ctx_(ContextOptions{.threads = 1}) {}

BatchBuilder::BatchBuilder(const ModelOptions& model, const parallel::Placement& placement,
                           const parallel::StrategyOptions& strategy, int cp_rank)
    : BatchBuilder(model,
                   ContextLayout{.placement = placement.kind(),
                                 .rows = placement.rows(),
                                 .row_length = placement.row_length(),
                                 .ranks = placement.ranks(),
                                 .strategy = strategy},
                   cp_rank) {}

std::shared_ptr<PreparedBatch> BatchBuilder::Build(const data::MicroBatch& batch) {
  LONGSPAN_CHECK(batch.rows == planner_.layout().rows &&
                 batch.row_length == planner_.layout().row_length);
  const TraceScope scope(ctx_.trace(), "prepare batch");
  CheckRange(batch.tokens, 0, model_.vocab_size, "token id");
  CheckRange(batch.labels, -1, model_.vocab_size, "label");
  auto prepared = std::make_shared<PreparedBatch>();
  const auto start = std::chrono::steady_clock::now();
  prepared->plans = planner_.PlansFor(std::make_shared<const ops::Documents>(
      ops::Documents::FromEnds(batch.row_length, batch.doc_ends)));
  prepared->plan_ms =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  const BatchPlans& plans = *prepared->plans;
  const parallel::Placement& placement = *plans.placement;
  LocalBatch& local = prepared->local;
  local.ids = ToTensor(ctx_, placement.Slice(batch.tokens, cp_rank_));
  local.labels = ToTensor(ctx_, placement.Slice(batch.labels, cp_rank_));
  local.order = ops::OrderTokens(ctx_, local.ids, model_.vocab_size);
  local.rope = ops::MakeRopeTable(ctx_, ToTensor(ctx_, placement.Slice(batch.positions, cp_rank_)),
                                  {.theta = model_.rope_theta, .head_dim = model_.head_dim},
                                  AccumulatorOf(model_.compute));
  local.plans = plans.plans;
  local.stream_plans = plans.stream_plans;
  local.seer_plans = plans.seer_plans;
  local.moba_plans = plans.moba_plans;
  prepared->attention_pairs = plans.attention_pairs;
  prepared->open_pairs = plans.open_pairs;
  return prepared;
}

}  // namespace longspan::trainer
