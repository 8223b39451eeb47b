#pragma once
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "ops/autograd/parameter.h"
#include "ops/core/context.h"
#include "trainer/model/options.h"

namespace longspan::trainer {

// What a layer calls the gates of its DuoOptions, f32 (f64) [kv heads].
inline constexpr const char* kDuoGate = "self_attn.duo_alpha";
// The maps of the gate of its SeerOptions, [kv heads, gate_dim, head_dim and 3 head_dim].
inline constexpr const char* kSeerQueryGate = "self_attn.seer_q.weight";
inline constexpr const char* kSeerKeyGate = "self_attn.seer_k.weight";

// Whether this is the name of a gate, whatever comes before it: objectives for gates train them,
// and other models do without.
bool IsGateName(std::string_view name);

// Name, shape and first value of one tensor of the model.
struct ParameterSpec {
  std::string name;  // Hugging Face Llama names: "model.layers.0.self_attn.q_proj.weight"
  Shape shape;
  double init_std;  // 0: ones (norm weights)
  bool decay;  // weight decay applies (not to norms, embeddings and gates of attention branches)
  bool gate = false;      // chooses between branches of attention: what objectives for gates train
  bool fraction = false;  // kept in [0, 1] after every update
  bool routes = false;    // chooses what is seen: only an objective for gates has a gradient for it
};
struct BucketSpec {
  std::string name;  // "embedding", "layer 0", ..., "head"
  std::vector<ParameterSpec> parameters;
};

// The buckets of a model in forward order: embedding, one per layer, head. With tied embeddings the
// output projection is the embedding table.
std::vector<BucketSpec> ListParameters(const ModelOptions& options);
int64_t CountParameters(const ModelOptions& options);         // values, tied ones once
int64_t CountTrainedParameters(const ModelOptions& options);  // with ModelOptions::gates_only
int64_t CountMatmulParameters(const ModelOptions& options);   // those that multiply every token

// The parameters that one layer (or the two ends of the model) owns, in flat buffers:
//   master         f32 (f64 in f64 mode), replicated on every rank
//   grad, m, v     the same for the trained elements only
//   value          compute dtype; the same memory as master unless that is bf16 (weights that start
//                  as ones, of norms and gates, are always read from master)
// Parameters lie one after another, trained ones first and of those the ones with weight decay, so
// that the optimizer makes two calls a bucket.
struct Bucket {
  std::string name;
  std::vector<ParameterSpec> specs;  // in storage order
  std::vector<int64_t> offsets;      // of each spec, in elements
  int64_t decay_end = 0;             // elements [0, decay_end) have weight decay
  int64_t trained_end = 0;           // elements [0, trained_end) are trained, the others frozen
  Tensor master, grad, m, v, value;  // flat
  std::deque<autograd::Parameter> parameters;
};

// All weights of one model replica, with what training them takes.
class ParameterStore {
 public:
  // Everything is on the device of `ctx`, which outlives the store. `training` false: no gradient
  // and optimizer buffers (evaluation). With options.gates_only these are for the gates alone, and
  // the gradients of all other parameters are undefined.
  ParameterStore(Context& ctx, const ModelOptions& options, bool training);

  std::vector<Bucket>& buckets() { return buckets_; }
  const autograd::Parameter& Find(const std::string& name) const;
  int64_t total() const { return total_; }

  // Values that depend on (seed, name, index) only: the same in every layout and on every device.
  void Initialize(uint64_t seed);
  // Refreshes the compute copies from the masters.
  void RefreshValues();
  void ZeroGrads();

 private:
  Context& ctx_;
  std::vector<Bucket> buckets_;
  int64_t total_ = 0;
};

}  // namespace longspan::trainer
