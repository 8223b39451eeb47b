#include "trainer/identity.h"

namespace longspan::trainer {

std::map<std::string, std::string> IdentityOf(const TrainOptions& o,
                                              const std::string& corpus_fingerprint) {
  const ModelOptions& m = o.model;
  std::map<std::string, std::string> id;
  auto set = [&](const char* field, const auto& value) { id[field] = Str(value); };
  set("run.seed", o.seed);
  set("run.context_length", o.context_length);
  set("run.global_batch_tokens", o.global_batch_tokens);
  set("run.precision", ToString(m.compute));
  set("model.vocab_size", m.vocab_size);
  set("model.hidden_size", m.hidden_size);
  set("model.num_layers", m.num_layers());
  set("model.num_heads", m.num_heads);
  set("model.num_kv_heads", m.num_kv_heads);
  set("model.head_dim", m.head_dim);
  set("model.ffn_hidden_size", m.ffn_hidden_size);
  set("model.mlp", m.mlp == MlpKind::kSwiGlu ? "SWIGLU" : "GELU");
  set("model.norm_eps", m.norm_eps);
  set("model.tie_embeddings", m.tie_embeddings);
  set("model.residual_dtype", ToString(m.residual));
  set("model.rope.theta", m.rope_theta);
  set("model.z_loss", m.z_loss);
  std::string layers;
  for (int layer : m.layers) {
    const MixerOptions& mixer = m.mixers[static_cast<size_t>(layer)];
    layers += (layers.empty() ? "" : ", ") + mixer.ToString();
    if (mixer.scale != 0) layers += Str(" scale ", mixer.scale);
  }
  set(kLayersField, layers);
  set("data.document_mask", o.document_mask);
  // Only where it is on: checkpoints older than the field have none.
  if (o.align_documents) set("data.align_documents", o.align_documents);
  if (o.balanced_packing) set("data.packing", "BALANCED");
  if (o.objective.kind != ObjectiveKind::kNextToken) set("objective", o.objective.ToString());
  set("data.train", corpus_fingerprint);
  return id;
}

}  // namespace longspan::trainer
