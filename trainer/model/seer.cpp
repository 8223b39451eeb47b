#include "trainer/model/seer.h"

#include <algorithm>
#include <cstring>

#include "ops/attention/attention.h"
#include "ops/autograd/kept.h"
#include "parallel/context/autograd.h"

namespace longspan::trainer {
namespace {

using autograd::Tape;
using autograd::Var;

// The gate's queries and keys [Hkv, N, G], from pooled activations.
struct Gate {
  Var q, k;
};
Gate GateOf(Tape& tape, const SeerPlan& plan, const SeerWeights& weights, const Tensor& plain_q,
            const Tensor& plain_k) {
  const ops::SeerPooled pooled = ops::SeerPool(tape.context(), plain_q, plain_k, plan.blocks);
  const auto turned = [&](const Tensor& x, const autograd::Parameter& w) {
    const Var y = autograd::HeadLinear(tape, Var(x), w);
    const Shape shape = y.value().shape();
    const Var rows = autograd::Reshape(tape, y, {shape[0] * shape[1], 1, shape[2]});
    return autograd::Reshape(tape, autograd::Rope(tape, rows, plan.rope), shape);
  };
  return {turned(pooled.queries, *weights.q), turned(pooled.keys, *weights.k)};
}

}  // namespace

double SeerPlan::KeptShare(const ops::SeerSelection& selection) const {
  if (selection.top_k == 0) return 1;
  int64_t kept = 0, all = 0;
  for (int64_t n = 0; n < blocks.count(); ++n) {
    const int64_t seen = n - blocks.first_key[static_cast<size_t>(n)] + 1;
    kept += std::min(seen, selection.top_k);
    all += seen;
  }
  return all > 0 ? static_cast<double>(kept) / static_cast<double>(all) : 1;
}

std::shared_ptr<const SeerPlan> MakeSeerPlan(Context& ctx, const ModelOptions& model,
                                             const SeerOptions& seer,
                                             const ops::Documents& documents) {
  auto plan = std::make_shared<SeerPlan>();
  plan->blocks = ops::SeerBlocks::Of(documents, seer.block_size);
  const int64_t n = plan->blocks.count(), per_row = plan->blocks.per_row();
  std::vector<int64_t> places;
  for (int64_t i = 0; i < model.num_kv_heads * n; ++i) places.push_back(i % n % per_row);
  const Tensor positions = ctx.Empty({static_cast<int64_t>(places.size())}, DType::kI64);
  std::memcpy(positions.raw(), places.data(), positions.bytes());
  plan->rope =
      ops::MakeRopeTable(ctx, positions, {.theta = model.rope_theta, .head_dim = seer.gate_dim},
                         AccumulatorOf(model.compute));
  return plan;
}

Var SeerAttention(Tape& tape, parallel::Communicator& cp, const SeerPlan& plan,
                  const parallel::AttentionPlan& causal, const ops::SeerSelection& selection,
                  const SeerWeights& weights, const Var& plain_q, const Var& plain_k, const Var& q,
                  const Var& k, const Var& v, const ops::AttentionOptions& options) {
  auto chosen = autograd::MakeOnce(tape, autograd::KeptKind::kAttention, [&] {
    Tape silent(tape.context(), /*recording=*/false);
    const Gate gate = GateOf(silent, plan, weights, plain_q.value(), plain_k.value());
    auto some = std::make_shared<parallel::AttentionPlan>(causal);
    some->whole = causal.whole->Restrict(
        ops::SeerSelect(tape.context(), gate.q.value(), gate.k.value(), plan.blocks, selection));
    return std::shared_ptr<const parallel::AttentionPlan>(std::move(some));
  });
  return parallel::ContextAttention(tape, cp, std::move(chosen), q, k, v, options);
}

Var SeerTeach(Tape& tape, const SeerPlan& plan, const parallel::AttentionPlan& causal,
              const SeerWeights& weights, const Var& plain_q, const Var& plain_k, const Var& q,
              const Var& k, const Var& v, const ops::AttentionOptions& options,
              SeerLesson& lesson) {
  Context& ctx = tape.context();
  LONGSPAN_CHECK(!q.requires_grad() && !k.requires_grad() && !v.requires_grad())
      << "SeerTeach: the weights below the gate must be frozen";
  const ops::BlockMask& mask = *causal.whole;
  ops::AttentionOptions dense = options;
  dense.round_output = true;
  dense.want_block_maxima = true;
  const auto result = ops::AttentionForward(
      ctx, q.value(), ops::MakeKvView(k.value(), v.value(), mask), mask, dense);

  const Gate gate = GateOf(tape, plan, weights, plain_q.value(), plain_k.value());
  const ops::SeerLoss loss =
      ops::SeerDistill(ctx, gate.q.value(), gate.k.value(), result.block_maxima, plan.blocks,
                       lesson.Skip(plan.blocks), lesson.weight);
  lesson.loss += lesson.weight * loss.sum;
  tape.Record([&ctx, gate, dq = loss.dq, dk = loss.dk] {
    gate.q.AddGrad(ctx, dq);
    gate.k.AddGrad(ctx, dk);
  });
  return Var(result.o);
}

}  // namespace longspan::trainer
