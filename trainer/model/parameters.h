#pragma once
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ops/autograd/parameter.h"
#include "ops/core/context.h"
#include "parallel/zero/shard_gather.h"
#include "parallel/zero/shard_groups.h"
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

// Consecutive parameters of a bucket that are treated alike and, where state is sharded, cut over
// the ranks as one flat tensor.
struct SegmentLayout {
  int64_t begin = 0, end = 0;  // elements of the bucket
  bool trained = false;
  bool narrow = false;      // used in a compute dtype that is not that of the masters
  bool resident = true;     // every rank always has these weights whole, as used
  bool keeps_grads = true;  // every rank has their gradients whole during all of a step
};

// Where the parameters that one layer (or the two ends of the model) owns lie in its flat buffers:
// one after another, trained ones first and of those the ones with weight decay.
struct BucketLayout {
  std::string name;
  std::vector<ParameterSpec> specs;  // in storage order
  std::vector<int64_t> offsets;      // of each spec, in elements
  int64_t elements = 0;
  int64_t decay_end = 0;    // elements [0, decay_end) have weight decay
  int64_t trained_end = 0;  // elements [0, trained_end) are trained, the others frozen
  std::vector<SegmentLayout> segments;
};

// What ZeRO shards from which stage on (arXiv 1910.02054).
inline constexpr int kShardsOptimizer = 1;   // master weights that are not used as such, moments
inline constexpr int kShardsGradients = 2;   // and gradients
inline constexpr int kShardsParameters = 3;  // and the weights as used
// Whole everywhere in all stages: weights that are vectors (norms, gates) where they would need a
// transfer of their own, and, of a model that trains its gates alone, those with their gradients.
std::vector<BucketLayout> LayOutParameters(const ModelOptions& options, int zero_stage = 0);

// What this rank keeps of a segment and updates: all of it, or with ZeRO its part of it. Tensors
// are flat and hold elements [begin, end) of the bucket; those of parts may be longer (FlatShard).
struct OwnedSegment {
  SegmentLayout layout;
  int64_t begin = 0, end = 0;
  Tensor master;      // f32 (f64 in f64 mode)
  Tensor value;       // the same in compute dtype; undefined where the master is used
  Tensor grad, m, v;  // as master; undefined for what is frozen
  // Sharded only: gradients before they are summed over ranks, [slot * parts], while they are
  // there; and the weights as used, of all ranks.
  Tensor whole_grad;
  std::unique_ptr<parallel::ShardGather> gather;
};

struct Bucket : BucketLayout {
  Bucket() = default;
  Bucket(Bucket&&) = default;
  Bucket& operator=(Bucket&&) = default;

  // Where nothing is sharded, all of it in one piece; else undefined:
  //   master         f32 (f64 in f64 mode), replicated on every rank
  //   grad, m, v     the same for the trained elements only
  //   value          compute dtype; the same memory as master unless that is bf16 (weights that
  //                  start as ones, of norms and gates, are always read from master)
  Tensor master, grad, m, v, value;
  std::vector<OwnedSegment> owned;  // one per segment
  std::deque<autograd::Parameter> parameters;
};

struct StoreOptions {
  bool training = true;  // false: no gradient and optimizer buffers (evaluation)
  int zero_stage = 0;
  parallel::ShardGroups* groups = nullptr;  // of zero_stage > 0; outlives the store
  // The moments of AdamW in pinned host memory, which the GPU reads and writes there.
  bool offload_optimizer = false;
};

// The weights of one model replica, with what training them takes, as far as this rank holds it.
//
// Where weights are sharded they are whole only while they are held: whoever runs a layer brackets
// it with Hold and Drop, and with OpenGrads before its backward pass. These are collective: all
// ranks call them in the same order. Elsewhere they cost nothing and need not be called.
class ParameterStore {
 public:
  // Everything is on the device of `ctx`, which outlives the store. With options.gates_only
  // gradient and optimizer buffers are for the gates alone, and the gradients of all other
  // parameters are undefined.
  ParameterStore(Context& ctx, const ModelOptions& options, bool training)
      : ParameterStore(ctx, options, StoreOptions{.training = training}) {}
  // Errors: InvalidArgument for options that do not go together (offloading without a GPU).
  ParameterStore(Context& ctx, const ModelOptions& options, const StoreOptions& store);

  std::vector<Bucket>& buckets() { return buckets_; }
  const autograd::Parameter& Find(const std::string& name) const;
  int64_t total() const { return total_; }
  bool sharded() const { return groups_ != nullptr; }
  parallel::ShardGroups* groups() const { return groups_; }

  // What this rank holds of parameter `spec` in one of its tensors: elements [begin, begin + numel)
  // of it, flattened; of an undefined tensor undefined.
  struct Part {
    Tensor elements;
    int64_t begin = 0;
  };
  static Part PartOf(const Bucket& bucket, size_t spec, Tensor OwnedSegment::*tensor);

  // Values that depend on (seed, name, index) only: the same in every layout and on every device.
  void Initialize(uint64_t seed);
  // Refreshes what is used from the masters. Collective where weights are sharded.
  void RefreshValues();
  void ZeroGrads();

  // Makes the weights of `bucket` usable until as many Drops, and begins to collect those of `next`
  // meanwhile.
  void Hold(size_t bucket, std::optional<size_t> next = std::nullopt);
  void Prefetch(size_t bucket);  // the second half of Hold alone
  void Drop(size_t bucket);
  // Gradients of `bucket` can be added to until they are taken; they begin as zeros unless they
  // were open already.
  void OpenGrads(size_t bucket);
  // Hands over the whole gradients of `bucket`, one tensor for each trained segment.
  std::vector<Tensor> TakeGrads(size_t bucket);
  // This rank's parts of their sums, bucket by bucket in the same order.
  std::vector<std::vector<Tensor>> GradParts() const;
  // Whether whole gradients add up over all micro-batches of a step, to be exchanged once.
  bool keeps_grads() const { return keeps_grads_; }
  // After an update of this bucket's masters and values: begins to tell the other ranks.
  void Publish(size_t bucket);
  // What this rank sends when all buckets are published.
  int64_t PublishedBytes() const;

 private:
  void AllocateWhole(Bucket& bucket, DType wide, const StoreOptions& store);
  void AllocateParts(Bucket& bucket, DType wide, const StoreOptions& store);
  void Bind(Bucket& bucket, const OwnedSegment& segment, const Tensor& whole,
            Tensor autograd::Parameter::*tensor);
  Tensor Moments(int64_t elements, DType dtype);

  Context& ctx_;
  const DType compute_;
  parallel::ShardGroups* const groups_;   // null: nothing is sharded
  std::shared_ptr<Allocator> offloaded_;  // of moments in host memory
  std::vector<Bucket> buckets_;
  std::vector<int> holds_;  // by bucket
  int64_t total_ = 0;
  bool keeps_grads_ = true;
};

}  // namespace longspan::trainer
