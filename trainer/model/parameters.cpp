#include "trainer/model/parameters.h"

#include <algorithm>
#include <cmath>

#include <utility>

namespace longspan::trainer {
namespace {

// Places in a bucket: what is trained with weight decay, what is trained without, what is frozen.
int OrderOf(const ParameterSpec& p, const ModelOptions& options) {
  if (options.gates_only ? !p.gate : p.routes) return 2;
  return p.decay ? 0 : 1;
}

}  // namespace

bool IsGateName(std::string_view name) {
  return name.ends_with(kDuoGate) || name.ends_with(kSeerQueryGate) || name.ends_with(kSeerKeyGate);
}

std::vector<BucketSpec> ListParameters(const ModelOptions& o) {
  const int64_t c = o.hidden_size, f = o.ffn_hidden_size;
  const int64_t q = o.num_heads * o.head_dim, kv = o.num_kv_heads * o.head_dim;
  // The two projections that write into the residual stream start smaller, as in GPT-2.
  const double narrow = o.init_std / std::sqrt(2.0 * static_cast<double>(o.num_layers()));
  std::vector<BucketSpec> buckets;
  buckets.push_back(
      {"embedding",
       {{"model.embed_tokens.weight", {o.vocab_size, c}, o.embedding_init_std, false}}});
  for (int64_t i = 0; i < o.num_layers(); ++i) {
    const std::string layer = Str("model.layers.", i, ".");
    BucketSpec b{Str("layer ", i), {}};
    b.parameters.push_back({layer + "self_attn.q_proj.weight", {q, c}, o.init_std, true});
    b.parameters.push_back({layer + "self_attn.k_proj.weight", {kv, c}, o.init_std, true});
    b.parameters.push_back({layer + "self_attn.v_proj.weight", {kv, c}, o.init_std, true});
    b.parameters.push_back({layer + "self_attn.o_proj.weight", {c, q}, narrow, true});
    if (o.mlp == MlpKind::kSwiGlu) {
      b.parameters.push_back({layer + "mlp.gate_proj.weight", {f, c}, o.init_std, true});
    }
    b.parameters.push_back({layer + "mlp.up_proj.weight", {f, c}, o.init_std, true});
    b.parameters.push_back({layer + "mlp.down_proj.weight", {c, f}, narrow, true});
    const MixerOptions& mixer = o.mixers[static_cast<size_t>(o.layers[static_cast<size_t>(i)])];
    if (mixer.seer.has_value()) {
      for (const auto& [name, width] :
           {std::pair{kSeerQueryGate, o.head_dim}, std::pair{kSeerKeyGate, 3 * o.head_dim}}) {
        b.parameters.push_back({layer + name,
                                {o.num_kv_heads, mixer.seer->gate_dim, width},
                                o.init_std,
                                false,
                                /*gate=*/true,
                                /*fraction=*/false,
                                /*routes=*/true});
      }
    }
    if (mixer.duo.has_value()) {
      b.parameters.push_back(
          {layer + kDuoGate, {o.num_kv_heads}, 0, false, /*gate=*/true, /*fraction=*/true});
    }
    b.parameters.push_back({layer + "input_layernorm.weight", {c}, 0, false});
    b.parameters.push_back({layer + "post_attention_layernorm.weight", {c}, 0, false});
    buckets.push_back(std::move(b));
  }
  BucketSpec head{"head", {}};
  if (!o.tie_embeddings) {
    head.parameters.push_back({"lm_head.weight", {o.vocab_size, c}, o.init_std, true});
  }
  head.parameters.push_back({"model.norm.weight", {c}, 0, false});
  buckets.push_back(std::move(head));
  return buckets;
}

int64_t CountParameters(const ModelOptions& options) {
  int64_t n = 0;
  for (const auto& bucket : ListParameters(options)) {
    for (const auto& p : bucket.parameters) n += p.shape.numel();
  }
  return n;
}

int64_t CountTrainedParameters(const ModelOptions& options) {
  int64_t n = 0;
  for (const auto& bucket : ListParameters(options)) {
    for (const auto& p : bucket.parameters) n += OrderOf(p, options) < 2 ? p.shape.numel() : 0;
  }
  return n;
}

int64_t CountMatmulParameters(const ModelOptions& options) {
  // An untied output projection is among the parameters with weight decay.
  int64_t n = options.tie_embeddings ? options.vocab_size * options.hidden_size : 0;
  for (const auto& bucket : ListParameters(options)) {
    for (const auto& p : bucket.parameters) {
      if (p.decay) n += p.shape.numel();
    }
  }
  return n;
}

std::vector<BucketLayout> LayOutParameters(const ModelOptions& options, int zero_stage) {
  const bool rounds = options.compute != AccumulatorOf(options.compute);
  std::vector<BucketLayout> buckets;
  for (BucketSpec& spec : ListParameters(options)) {
    BucketLayout b;
    b.name = std::move(spec.name);
    b.specs = std::move(spec.parameters);
    // Last, what is used as it is stored: norm weights and gates are few, and bf16 near 1 is
    // coarse.
    const auto order = [&](const ParameterSpec& p) {
      return std::pair(OrderOf(p, options), p.init_std == 0);
    };
    std::stable_sort(b.specs.begin(), b.specs.end(),
                     [&](const auto& p, const auto& q) { return order(p) < order(q); });
    for (const ParameterSpec& p : b.specs) {
      const int place = OrderOf(p, options);
      SegmentLayout s{.begin = b.elements,
                      .end = b.elements + p.shape.numel(),
                      .trained = place < 2,
                      .narrow = rounds};
      if (zero_stage > 0) {
        s.narrow = rounds && p.init_std != 0;
        const bool gate = options.gates_only && s.trained;
        s.resident = zero_stage < kShardsParameters || (rounds && !s.narrow) || gate;
        s.keeps_grads = zero_stage < kShardsGradients || gate;
      }
      b.offsets.push_back(s.begin);
      b.elements = s.end;
      if (place < 1) b.decay_end = s.end;
      if (place < 2) b.trained_end = s.end;
      SegmentLayout* last = b.segments.empty() ? nullptr : &b.segments.back();
      if (last != nullptr && last->trained == s.trained && last->narrow == s.narrow) {
        last->end = s.end;
      } else {
        b.segments.push_back(s);
      }
    }
    buckets.push_back(std::move(b));
  }
  return buckets;
}

}  // namespace longspan::trainer
