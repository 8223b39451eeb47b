#include "trainer/model/decoder.h"

#include <algorithm>
#include <initializer_list>

#include "ops/autograd/recompute.h"
#include "parallel/context/autograd.h"
#include "trainer/model/weight_use.h"

namespace longspan::trainer {
namespace {

using autograd::Parameter;
using autograd::Tape;
using autograd::Var;

bool AnyTrained(std::initializer_list<const Parameter*> parameters) {
  return std::any_of(parameters.begin(), parameters.end(),
                     [](const Parameter* p) { return p != nullptr && p->WantsGrad(); });
}

struct LayerParameters {
  const Parameter *q, *k, *v, *o, *gate, *up, *down, *attention_norm, *mlp_norm;
  const Parameter* duo;  // nullptr: this layer has no such gates
  SeerWeights seer;      // nullptr, the same
  bool Trained() const {
    return MlpTrained() || AnyTrained({q, k, v, o, attention_norm, duo, seer.q, seer.k});
  }
  bool MlpTrained() const { return AnyTrained({gate, up, down, mlp_norm}); }
};

LayerParameters LayerOf(const ModelOptions& options, const ParameterStore& store, size_t layer) {
  const std::string prefix = Str("model.layers.", layer, ".");
  const MixerOptions& mixer = options.mixers[static_cast<size_t>(options.layers[layer])];
  auto find = [&](const char* name) { return &store.Find(prefix + name); };
  return {find("self_attn.q_proj.weight"),
          find("self_attn.k_proj.weight"),
          find("self_attn.v_proj.weight"),
          find("self_attn.o_proj.weight"),
          options.mlp == MlpKind::kSwiGlu ? find("mlp.gate_proj.weight") : nullptr,
          find("mlp.up_proj.weight"),
          find("mlp.down_proj.weight"),
          find("input_layernorm.weight"),
          find("post_attention_layernorm.weight"),
          mixer.duo.has_value() ? find(kDuoGate) : nullptr,
          {mixer.seer.has_value() ? find(kSeerQueryGate) : nullptr,
           mixer.seer.has_value() ? find(kSeerKeyGate) : nullptr}};
}

Var Norm(Tape& tape, const ModelOptions& options, const Var& x, const Parameter& w) {
  return autograd::Cast(tape, autograd::RmsNorm(tape, x, w, options.norm_eps), options.compute);
}

Var AttentionBranch(Tape& tape, parallel::Communicator& cp, const ModelOptions& options,
                    const LayerParameters& p, size_t mixer, const LocalBatch& batch, GateUse gates,
                    SeerLesson* lesson, const Var& x) {
  const int64_t t = x.value().dim(0), d = options.head_dim;
  const Var h = Norm(tape, options, x, *p.attention_norm);
  auto heads = [&](const Parameter& w, int64_t n) {
    return autograd::Reshape(tape, autograd::Linear(tape, h, w), {t, n, d});
  };
  const Var plain_q = heads(*p.q, options.num_heads), plain_k = heads(*p.k, options.num_kv_heads);
  const Var q = autograd::Rope(tape, plain_q, batch.rope);
  const Var k = autograd::Rope(tape, plain_k, batch.rope);
  const Var v = heads(*p.v, options.num_kv_heads);
  ops::AttentionOptions how = options.mixers[mixer].Attention();
  how.implementation = options.attention_implementation;
  const auto attend = [&](std::shared_ptr<const parallel::AttentionPlan> plan) {
    return parallel::ContextAttention(tape, cp, std::move(plan), q, k, v, how);
  };
  Var o;
  if (options.mixers[mixer].moba) {
    o = parallel::RoutedContextAttention(tape, cp, batch.moba_plans[mixer], q, k, v, how);
  } else if (p.seer.q != nullptr && gates == GateUse::kTaught) {
    o = SeerTeach(tape, *batch.seer_plans[mixer], *batch.plans[mixer], p.seer, plain_q, plain_k, q,
                  k, v, how, *lesson);
  } else if (p.seer.q != nullptr && gates == GateUse::kMixed) {
    o = SeerAttention(tape, cp, *batch.seer_plans[mixer], *batch.plans[mixer],
                      options.mixers[mixer].seer->selection, p.seer, plain_q, plain_k, q, k, v,
                      how);
  } else {
    o = attend(batch.plans[mixer]);
  }
  if (p.duo != nullptr && gates == GateUse::kMixed) {
    o = autograd::DuoGate(tape, o, attend(batch.stream_plans[mixer]), *p.duo);
  }
  return autograd::Linear(tape, autograd::Reshape(tape, o, {t, options.num_heads * d}), *p.o);
}

Var MlpBranch(Tape& tape, const ModelOptions& options, const LayerParameters& p, const Var& x) {
  const Var h = Norm(tape, options, x, *p.mlp_norm);
  const Var up = autograd::Linear(tape, h, *p.up);
  const Var inner = options.mlp == MlpKind::kSwiGlu
                        ? autograd::SwiGlu(tape, autograd::Linear(tape, h, *p.gate), up)
                        : autograd::Gelu(tape, up);
  return autograd::Linear(tape, inner, *p.down);
}

// x plus its MLP branch, tile by tile where the options say so.
Var AddMlp(Tape& tape, const ModelOptions& options, const LayerParameters& p, const Var& x) {
  const auto add = [&options, p](Tape& t, const Var& rows) {
    return autograd::ResidualAdd(t, rows, MlpBranch(t, options, p, rows));
  };
  const int64_t tokens = x.value().dim(0), tile = options.MlpTile(tokens);
  return tile < tokens ? autograd::RecomputeRows(tape, x, tile, p.MlpTrained(), add) : add(tape, x);
}

using Weights = WeightUse<Tape, ParameterStore>;

// The hidden states after the last norm. The head's weights stay in use until the caller ends that.
Var RunLayers(Tape& tape, parallel::Communicator& cp, const ModelOptions& options,
              ParameterStore& store, Weights& weights, const LocalBatch& batch,
              const BucketHook& bucket_ready, GateUse gates, SeerLesson* lesson) {
  const size_t layers = static_cast<size_t>(options.num_layers());
  // An entry recorded before a bucket's first use runs after its last gradient has been added.
  auto mark = [&](size_t bucket) {
    if (bucket_ready) tape.Record([bucket_ready, bucket] { bucket_ready(bucket); });
  };

  mark(0);
  weights.BeginEmbedding();
  const Parameter& table = store.Find("model.embed_tokens.weight");
  Var x = autograd::Embedding(tape, batch.ids, table, options.residual, batch.order);
  weights.EndEmbedding();
  for (size_t i = 0; i < layers; ++i) {
    mark(i + 1);
    const LayerParameters p = LayerOf(options, store, i);
    const size_t mixer = static_cast<size_t>(options.layers[i]);
    auto layer = [&cp, &options, &batch, p, mixer, gates, lesson](Tape& t,
                                                                  const std::vector<Var>& in) {
      const Var mixed = autograd::ResidualAdd(
          t, in[0], AttentionBranch(t, cp, options, p, mixer, batch, gates, lesson, in[0]));
      return AddMlp(t, options, p, mixed);
    };
    // A layer that leads to nothing trained keeps nothing, so there is nothing to run again; what a
    // lesson keeps is small, and it is to be learnt once.
    const bool differentiated = gates != GateUse::kTaught && (x.requires_grad() || p.Trained());
    weights.BeginLayer(i + 1, differentiated);
    x = options.recompute_layers && differentiated
            ? autograd::Recompute(tape, {x}, layer, {.keep_attention = options.keep_attention})
            : layer(tape, {x});
    weights.EndLayer(i + 1, differentiated);
  }
  mark(layers + 1);
  weights.BeginHead(layers + 1);
  return Norm(tape, options, x, store.Find("model.norm.weight"));
}

}  // namespace

Var DecoderHidden(Tape& tape, parallel::Communicator& cp, const ModelOptions& options,
                  ParameterStore& store, const LocalBatch& batch, const BucketHook& bucket_ready,
                  GateUse gates, SeerLesson* lesson) {
  Weights weights(tape, store, /*tied=*/false);
  const Var x = RunLayers(tape, cp, options, store, weights, batch, bucket_ready, gates, lesson);
  weights.EndHead(static_cast<size_t>(options.num_layers()) + 1);
  return x;
}

ops::LinearCrossEntropyResult DecoderForward(Tape& tape, parallel::Communicator& cp,
                                             const ModelOptions& options, ParameterStore& store,
                                             const LocalBatch& batch,
                                             const BucketHook& bucket_ready,
                                             bool want_token_losses) {
  Weights weights(tape, store, options.tie_embeddings);
  const Var x = RunLayers(tape, cp, options, store, weights, batch, bucket_ready, GateUse::kMixed,
                          /*lesson=*/nullptr);
  const Parameter& head =
      store.Find(options.tie_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
  auto result = autograd::LinearCrossEntropy(
      tape, x, head, batch.labels,
      {.z_loss = options.z_loss, .want_token_losses = want_token_losses});
  weights.EndHead(static_cast<size_t>(options.num_layers()) + 1);
  return result;
}

}  // namespace longspan::trainer
