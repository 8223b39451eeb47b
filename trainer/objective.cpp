#include "trainer/objective.h"

namespace longspan::trainer {
namespace {

using autograd::Parameter;

std::vector<const Parameter*> DuoGates(const ModelOptions& options, const ParameterStore& store) {
  std::vector<const Parameter*> gates;
  for (size_t i = 0; i < options.layers.size(); ++i) {
    if (options.mixers[static_cast<size_t>(options.layers[i])].duo.has_value()) {
      gates.push_back(&store.Find(Str("model.layers.", i, ".", kDuoGate)));
    }
  }
  return gates;
}

Tensor DuoGatesForward(autograd::Tape& tape, parallel::Communicator& cp, double regularization,
                       const ModelOptions& options, ParameterStore& store, const LocalBatch& batch,
                       const BucketHook& bucket_ready) {
  autograd::Tape silent(tape.context(), /*recording=*/false);
  const Tensor target =
      DecoderHidden(silent, cp, options, store, batch, {}, GateUse::kOpen).value();
  const autograd::Var x = DecoderHidden(tape, cp, options, store, batch, bucket_ready);
  Tensor sums = autograd::HiddenDistance(tape, x, target, batch.labels);
  const std::vector<const Parameter*> gates = DuoGates(options, store);
  const double share = 1.0 / static_cast<double>(gates.size() * options.num_kv_heads);
  for (const Parameter* alpha : gates) {
    autograd::GatePenalty(tape, *alpha, {.weight = regularization * share, .share = share}, sums);
  }
  return sums;
}

// Mixers with gates have one block size (configs/validate_objective.cpp), so that rows of blocks
// are worth the same in all layers.
Tensor SeerGatesForward(autograd::Tape& tape, parallel::Communicator& cp, bool drop_first_quarter,
                        const ModelOptions& options, ParameterStore& store, const LocalBatch& batch,
                        const BucketHook& bucket_ready) {
  SeerLesson lesson{.drop_first_quarter = drop_first_quarter};
  double gates = 0;
  const SeerPlan* plan = nullptr;
  for (const int layer : options.layers) {
    const auto mixer = static_cast<size_t>(layer);
    if (!options.mixers[mixer].seer.has_value()) continue;
    gates += static_cast<double>(options.num_kv_heads);
    plan = batch.seer_plans[mixer].get();
  }
  LONGSPAN_CHECK(plan != nullptr) << "no layer has a gate that chooses blocks";
  lesson.weight = 1 / gates;
  DecoderHidden(tape, cp, options, store, batch, bucket_ready, GateUse::kTaught, &lesson);
  const Tensor sums = tape.context().Zeros({ops::kLossSums}, DType::kF64);
  sums.data<double>()[ops::kLossSum] = lesson.loss;
  sums.data<double>()[ops::kValidSum] =
      static_cast<double>(ops::SeerCountedRows(plan->blocks, lesson.Skip(plan->blocks)));
  return sums;
}

}  // namespace

const char* ObjectiveOptions::name() const {
  switch (kind) {
    case ObjectiveKind::kDuoGates:
      return "duo_gates";
    case ObjectiveKind::kSeerGates:
      return "seer_gates";
    default:
      return "next_token";
  }
}

std::string ObjectiveOptions::ToString() const {
  switch (kind) {
    case ObjectiveKind::kDuoGates:
      return Str(name(), " regularization ", regularization);
    case ObjectiveKind::kSeerGates:
      return Str(name(), drop_first_quarter ? " without the first quarter" : "");
    default:
      return name();
  }
}

Tensor ObjectiveForward(autograd::Tape& tape, parallel::Communicator& cp,
                        const ObjectiveOptions& objective, const ModelOptions& options,
                        ParameterStore& store, const LocalBatch& batch,
                        const BucketHook& bucket_ready) {
  switch (objective.kind) {
    case ObjectiveKind::kNextToken:
      return DecoderForward(tape, cp, options, store, batch, bucket_ready).sums;
    case ObjectiveKind::kDuoGates:
      return DuoGatesForward(tape, cp, objective.regularization, options, store, batch,
                             bucket_ready);
    case ObjectiveKind::kSeerGates:
      return SeerGatesForward(tape, cp, objective.drop_first_quarter, options, store, batch,
                              bucket_ready);
  }
  throw InvalidArgument("ObjectiveForward: unknown objective");
}

ObjectiveFlops FlopsOf(const ObjectiveOptions& objective, const ModelOptions& options) {
  const double matmul = static_cast<double>(CountMatmulParameters(options));
  const double pair = 4.0 * static_cast<double>(options.head_dim);
  if (objective.kind == ObjectiveKind::kNextToken) return {6 * matmul, 3 * pair, 0};
  const double output = static_cast<double>(options.vocab_size * options.hidden_size);
  if (objective.kind == ObjectiveKind::kSeerGates) return {2 * (matmul - output), 0, pair};
  // Two forward passes and the gradient of the activations, none of them with the output matrix.
  return {6 * (matmul - output), 3 * pair, pair};
}

}  // namespace longspan::trainer
