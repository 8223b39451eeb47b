#include "trainer/model/parameters.h"

#include <algorithm>
#include <cmath>

#include "ops/core/parallel_for.h"
#include "ops/core/rng.h"
#include "ops/elementwise/elementwise.h"

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

ParameterStore::ParameterStore(Context& ctx, const ModelOptions& options, bool training)
    : ctx_(ctx) {
  const DType wide = AccumulatorOf(options.compute);
  for (BucketSpec& spec : ListParameters(options)) {
    Bucket b;
    b.name = spec.name;
    b.specs = std::move(spec.parameters);
    const auto order = [&](const ParameterSpec& p) { return OrderOf(p, options); };
    std::stable_sort(b.specs.begin(), b.specs.end(),
                     [&](const auto& p, const auto& q) { return order(p) < order(q); });
    int64_t n = 0;
    for (const ParameterSpec& p : b.specs) {
      b.offsets.push_back(n);
      n += p.shape.numel();
      if (order(p) < 1) b.decay_end = n;
      if (order(p) < 2) b.trained_end = n;
    }
    const auto zeros = [&](MemoryCategory category, int64_t elements, DType dtype) {
      const MemoryScope scope(ctx.allocator(), category);
      return ctx.Zeros({elements}, dtype);
    };
    b.master = zeros(MemoryCategory::kParameters, n, wide);
    b.value =
        options.compute == wide ? b.master : zeros(MemoryCategory::kParameters, n, options.compute);
    if (training) {
      b.grad = zeros(MemoryCategory::kGradients, b.trained_end, wide);
      b.m = zeros(MemoryCategory::kOptimizer, b.trained_end, wide);
      b.v = zeros(MemoryCategory::kOptimizer, b.trained_end, wide);
    }
    for (size_t i = 0; i < b.specs.size(); ++i) {
      const ParameterSpec& p = b.specs[i];
      const int64_t begin = b.offsets[i], end = begin + p.shape.numel();
      // Norm weights are used as they are stored: they are few, and bf16 near 1 is coarse.
      const Tensor& source = p.init_std == 0 ? b.master : b.value;
      b.parameters.push_back(
          {p.name, source.Rows(begin, end).Reshape(p.shape),
           training && end <= b.trained_end ? b.grad.Rows(begin, end).Reshape(p.shape) : Tensor()});
    }
    total_ += n;
    buckets_.push_back(std::move(b));
  }
}

const autograd::Parameter& ParameterStore::Find(const std::string& name) const {
  for (const Bucket& b : buckets_) {
    for (const autograd::Parameter& p : b.parameters) {
      if (p.name == name) return p;
    }
  }
  throw InvalidArgument("no parameter is called " + name);
}

void ParameterStore::Initialize(uint64_t seed) {
  for (Bucket& b : buckets_) {
    for (size_t i = 0; i < b.specs.size(); ++i) {
      const ParameterSpec& p = b.specs[i];
      const Philox rng(seed, StreamOf(p.name.c_str()));
      Tensor weights = b.master.Rows(b.offsets[i], b.offsets[i] + p.shape.numel());
      DispatchFloat(b.master.dtype(), "Initialize", [&]<class T>() {
        if constexpr (!std::is_same_v<T, BF16>) {
          // Always computed on the host, so that all devices start from the same bits.
          const bool direct = ctx_.device().kind == DeviceKind::kCpu;
          std::vector<T> staged(direct ? 0 : static_cast<size_t>(weights.numel()));
          T* out = direct ? weights.data<T>() : staged.data();
          ParallelRanges(ctx_, weights.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j) {
              // Rounded to f32 in every mode, so that F32 and F64 runs start from the same weights.
              out[j] = p.init_std == 0 ? T(1)
                                       : static_cast<T>(static_cast<float>(
                                             p.init_std * rng.Normal(static_cast<uint64_t>(j))));
            }
          });
          if (!direct) weights.WriteFrom(staged.data());
        }
      });
    }
  }
  RefreshValues();
}

void ParameterStore::RefreshValues() {
  for (Bucket& b : buckets_) {
    if (b.value.raw() != b.master.raw()) ops::CastInto(ctx_, b.master, b.value);
  }
}

void ParameterStore::ZeroGrads() {
  for (Bucket& b : buckets_) ctx_.SetZero(b.grad);
}

}  // namespace longspan::trainer
