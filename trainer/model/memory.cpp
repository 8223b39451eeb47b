#include "trainer/model/memory.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/autograd/recompute.h"
#include "ops/core/dtype.h"
#include "ops/loss/linear_cross_entropy.h"
#include "trainer/model/state_memory.h"
#include "trainer/model/weight_use.h"

namespace longspan::trainer {
namespace {

// Bytes handed out now, and of what they consisted when they were most.
class Meter {
 public:
  void Take(MemoryCategory category, size_t bytes) {
    used_[static_cast<size_t>(category)] += bytes;
    total_ += bytes;
    if (total_ <= most_) return;
    most_ = total_;
    peak_ = used_;
  }
  void Give(MemoryCategory category, size_t bytes) {
    used_[static_cast<size_t>(category)] -= bytes;
    total_ -= bytes;
  }
  const BytesByCategory& peak() const { return peak_; }

 private:
  BytesByCategory used_{}, peak_{};
  size_t total_ = 0, most_ = 0;
};

// A tensor's memory for as long as somebody refers to it.
class Held {
 public:
  Held(Meter& meter, size_t bytes, MemoryCategory category = MemoryCategory::kActivations)
      : meter_(meter), bytes_(bytes), category_(category) {
    meter_.Take(category_, bytes_);
  }
  ~Held() { meter_.Give(category_, bytes_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

 private:
  Meter& meter_;
  const size_t bytes_;
  const MemoryCategory category_;
};
using Block = std::shared_ptr<const Held>;

// The shadow of autograd::Var: who keeps what alive, without the numbers.
struct Node {
  Block value, grad;
  int64_t elements = 0;
  DType dtype = DType::kF32;
};
using Shadow = std::shared_ptr<Node>;

// What attention leaves to its backward pass.
struct AttentionMemory {
  Block o;
  std::vector<Block> others;  // lse, lists of routed attention
};

// The shadow of autograd::KeptResults.
struct ShadowKept {
  bool attention = false;
  std::deque<AttentionMemory> attentions{};
  std::deque<Block> rows{};
};

// The shadow of autograd::Tape and of the ops on it (ops/autograd/functions.cpp).
class ShadowTape {
 public:
  // `scratch`: bytes that the backward pass of attention makes for itself, by mixer.
  ShadowTape(Meter& meter, const ModelOptions& model, int64_t tokens, int64_t rows,
             const std::vector<size_t>& scratch, bool recording = true, ShadowKept* kept = nullptr)
      : meter_(meter),
        model_(model),
        tokens_(tokens),
        rows_(rows),
        row_length_((tokens + rows - 1) / rows),
        scratch_(scratch),
        recording_(recording),
        kept_(kept) {}

  const ModelOptions& model() const { return model_; }
  bool recording() const { return recording_; }
  int64_t tokens() const { return tokens_; }
  DType wide() const { return AccumulatorOf(model_.compute); }
  Block Make(int64_t elements, DType dtype,
             MemoryCategory category = MemoryCategory::kActivations) {
    const size_t bytes = static_cast<size_t>(elements) * SizeOf(dtype);
    return std::make_shared<const Held>(meter_, Allocator::BlockBytes(bytes), category);
  }
  Shadow Value(int64_t width, DType dtype) {
    return std::make_shared<Node>(Node{Make(tokens_ * width, dtype), {}, tokens_ * width, dtype});
  }

  void Record(std::function<void()> backward) {
    if (recording_) entries_.push_back(std::move(backward));
  }
  void Backward() {
    while (!entries_.empty()) {
      const std::function<void()> entry = std::move(entries_.back());
      entries_.pop_back();
      entry();
    }
  }
  void AddGrad(const Shadow& x, const Block& grad) {
    if (x->grad == nullptr) {
      x->grad = grad;
    } else if (x->grad.use_count() > 1) {
      x->grad = Make(x->elements, x->dtype);
    }
  }
  Block Like(const Shadow& x) { return Make(x->elements, x->dtype); }

  Shadow Linear(const Shadow& x, int64_t width) {
    const Shadow y = Value(width, x->dtype);
    Record([this, x, y] { AddGrad(x, Like(x)); });
    return y;
  }
  Shadow Norm(const Shadow& x) {
    const Shadow y = Value(x->elements / tokens_, x->dtype);
    Record([this, x, y, rstd = Make(tokens_, wide())] { AddGrad(x, Like(x)); });
    return Cast(y, model_.compute);
  }
  Shadow Cast(const Shadow& x, DType dtype) {
    if (x->dtype == dtype) return x;
    const Shadow y = Value(x->elements / tokens_, dtype);
    Record([this, x, y] { AddGrad(x, Like(x)); });
    return y;
  }
  Shadow Rope(const Shadow& x) {
    const Shadow y = Value(x->elements / tokens_, x->dtype);
    Record([this, x, y] { AddGrad(x, Like(x)); });
    return y;
  }
  Shadow Activation(const std::vector<Shadow>& inputs) {
    const Shadow y = Value(inputs[0]->elements / tokens_, inputs[0]->dtype);
    Record([this, inputs, y] {
      std::vector<Block> grads;
      for (const Shadow& x : inputs) grads.push_back(Like(x));
      for (size_t i = 0; i < inputs.size(); ++i) AddGrad(inputs[i], grads[i]);
    });
    return y;
  }
  Shadow ResidualAdd(const Shadow& x, const Shadow& branch) {
    const Shadow y = Value(x->elements / tokens_, x->dtype);
    Record([this, x, branch, y] {
      AddGrad(x, y->grad);
      AddGrad(branch, branch->dtype == y->dtype ? y->grad : Like(branch));
    });
    return y;
  }
  Shadow Attention(const Shadow& q, const Shadow& k, const Shadow& v, size_t mixer_index) {
    const bool softmax = !model_.mixers[mixer_index].IsSigmoid();
    const int64_t rows = tokens_ * model_.num_heads;
    const AttentionMemory saved =
        Once(kept_ != nullptr && kept_->attention ? &kept_->attentions : nullptr,
             [&] { return AttentionForward(q, model_.mixers[mixer_index]); });
    const auto o = std::make_shared<Node>(Node{saved.o, {}, q->elements, q->dtype});
    Record([this, q, k, v, o, softmax, rows, mixer_index, saved] {
      const Block dq = Make(q->elements, wide()), dkv = Make(2 * k->elements, wide()),
                  delta = softmax ? Make(rows, wide()) : Block();
      { const Held scratch(meter_, scratch_[mixer_index]); }
      const Block rounded_q = Like(q), rounded_k = Like(k), rounded_v = Like(v);
      AddGrad(q, rounded_q);
      AddGrad(k, rounded_k);
      AddGrad(v, rounded_v);
    });
    return o;
  }
  void CrossEntropy(const Shadow& x, DeviceKind device) {
    const int64_t rows = std::min(tokens_, ops::AutoChunkTokens(model_.vocab_size, device));
    const Block lse = Make(tokens_, wide());
    { const Block losses = Make(tokens_, wide()), chunk = Make(rows * model_.vocab_size, wide()); }
    const ops::LinearCrossEntropyScratch scratch = ops::BackwardScratch(
        tokens_, model_.hidden_size, model_.vocab_size, model_.compute, device);
    Record([this, x, lse, scratch] {
      const Block dx = Like(x), logits = Make(scratch.logits, wide()),
                  gradients = Make(scratch.gradients, x->dtype), sums = Make(scratch.sums, wide());
      AddGrad(x, dx);
    });
  }
  using Segment = std::function<Shadow(ShadowTape&, const Shadow&)>;
  Shadow Recompute(const Shadow& x, const Segment& segment) {
    const auto kept = std::make_shared<ShadowKept>(ShadowKept{model_.keep_attention});
    ShadowTape silent(meter_, model_, tokens_, rows_, scratch_, /*recording=*/false, kept.get());
    const Block value = segment(silent, x)->value;
    const auto y = std::make_shared<Node>(Node{value, {}, x->elements, x->dtype});
    Record([this, x, segment, y, kept] {
      ShadowTape inner(meter_, model_, tokens_, rows_, scratch_, /*recording=*/true, kept.get());
      const auto fresh = std::make_shared<Node>(Node{x->value, {}, x->elements, x->dtype});
      const Shadow again = segment(inner, fresh);
      inner.AddGrad(again, y->grad);
      inner.Backward();
      AddGrad(x, fresh->grad);
    });
    return y;
  }
  // One tile stands for all of them, which leave nothing behind.
  Shadow RecomputeRows(const Shadow& x, int64_t rows, const Segment& segment) {
    const int64_t tile = autograd::TileRows(tokens_, rows);
    const int64_t elements = x->elements / tokens_ * tile;
    const Block value = Once(kept_ != nullptr ? &kept_->rows : nullptr, [&] {
      const Block whole = Like(x);
      ShadowTape silent(meter_, model_, tile, 1, scratch_, /*recording=*/false);
      segment(silent, std::make_shared<Node>(Node{x->value, {}, elements, x->dtype}));
      return whole;
    });
    const auto y = std::make_shared<Node>(Node{value, {}, x->elements, x->dtype});
    Record([this, x, tile, elements, segment, y] {
      const Block dx = Like(x);
      ShadowTape inner(meter_, model_, tile, 1, scratch_);
      const auto part = std::make_shared<Node>(Node{x->value, {}, elements, x->dtype});
      inner.AddGrad(segment(inner, part), y->grad);
      inner.Backward();
      AddGrad(x, dx);
    });
    return y;
  }

 private:
  // The shadow of autograd::MakeOnce.
  template <class T, class Make>
  T Once(std::deque<T>* kept, Make make) {
    if (kept == nullptr) return make();
    if (!recording_) return kept->emplace_back(make());
    T result = std::move(kept->front());
    kept->pop_front();
    return result;
  }
  AttentionMemory AttentionForward(const Shadow& q, const MixerOptions& mixer) {
    constexpr MemoryCategory kAttention = MemoryCategory::kAttention;
    AttentionMemory made{Make(q->elements, q->dtype, kAttention), {}};
    const int64_t rows = tokens_ * model_.num_heads;
    if (!mixer.IsSigmoid()) made.others.push_back(Make(rows, wide(), kAttention));  // lse
    if (mixer.moba.has_value()) {
      const Block sums = q->dtype == wide() ? Block() : Make(q->elements, wide(), kAttention);
      // What is chosen, and the lists of it.
      const int64_t blocks = (row_length_ + mixer.moba->block_size - 1) / mixer.moba->block_size;
      const int64_t chosen = rows * (std::min(mixer.moba->top_k, blocks) - 1);
      for (int i = 0; i < 2; ++i) made.others.push_back(Make(chosen, DType::kI32, kAttention));
    }
    return made;
  }

  Meter& meter_;
  const ModelOptions& model_;
  const int64_t tokens_, rows_, row_length_;
  const std::vector<size_t>& scratch_;
  const bool recording_;
  ShadowKept* const kept_;
  std::vector<std::function<void()>> entries_;
};

// The shadows of AttentionBranch, MlpBranch and AddMlp (decoder.cpp).
Shadow AttentionBranch(ShadowTape& tape, const Shadow& x, size_t index) {
  const ModelOptions& m = tape.model();
  const MixerOptions& mixer = m.mixers[index];
  const Shadow h = tape.Norm(x);
  const int64_t query = m.num_heads * m.head_dim, key = m.num_kv_heads * m.head_dim;
  const Shadow q = tape.Rope(tape.Linear(h, query)), k = tape.Rope(tape.Linear(h, key)),
               v = tape.Linear(h, key);
  Shadow o = tape.Attention(q, k, v, index);
  if (mixer.duo.has_value()) o = tape.Activation({o, tape.Attention(q, k, v, index)});
  return tape.Linear(o, m.hidden_size);
}

Shadow MlpBranch(ShadowTape& tape, const Shadow& x) {
  const ModelOptions& m = tape.model();
  const Shadow h = tape.Norm(x), up = tape.Linear(h, m.ffn_hidden_size);
  const Shadow inner = m.mlp == MlpKind::kSwiGlu
                           ? tape.Activation({tape.Linear(h, m.ffn_hidden_size), up})
                           : tape.Activation({up});
  return tape.Linear(inner, m.hidden_size);
}

Shadow AddMlp(ShadowTape& tape, const Shadow& x) {
  const auto add = [](ShadowTape& t, const Shadow& rows) {
    return t.ResidualAdd(rows, MlpBranch(t, rows));
  };
  const int64_t tile = tape.model().MlpTile(tape.tokens());
  return tile < tape.tokens() ? tape.RecomputeRows(x, tile, add) : add(tape, x);
}

void Forward(ShadowTape& tape, StateMemory& state, DeviceKind device) {
  const ModelOptions& model = tape.model();
  WeightUse weights(tape, state, model.tie_embeddings);
  const auto mark = [&](size_t bucket) {
    tape.Record([&state, bucket] { state.BucketReady(bucket); });
  };
  mark(0);
  weights.BeginEmbedding();
  Shadow x = tape.Value(model.hidden_size, model.residual);
  weights.EndEmbedding();
  size_t bucket = 0;
  for (const int mixer : model.layers) {
    const auto layer = [mixer](ShadowTape& t, const Shadow& in) {
      const Shadow mixed = t.ResidualAdd(in, AttentionBranch(t, in, static_cast<size_t>(mixer)));
      return AddMlp(t, mixed);
    };
    mark(++bucket);
    weights.BeginLayer(bucket, /*differentiated=*/true);
    x = model.recompute_layers ? tape.Recompute(x, layer) : layer(tape, x);
    weights.EndLayer(bucket, /*differentiated=*/true);
  }
  mark(++bucket);
  weights.BeginHead(bucket);
  tape.CrossEntropy(tape.Norm(x), device);
  weights.EndHead(bucket);
}

// What the backward pass of attention makes for itself, by mixer: of blocks, which lists of routed
// attention have none of.
std::vector<size_t> AttentionScratch(const ModelOptions& model, int64_t tokens, DeviceKind device,
                                     int64_t rows) {
  std::vector<size_t> scratch(model.mixers.size(), 0);
  if (device != DeviceKind::kCpu || tokens % rows != 0) return scratch;
  const auto documents =
      std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(rows, tokens / rows));
  const ops::BlockList blocks = ops::BlockList::All(*documents);
  for (size_t i = 0; i < model.mixers.size(); ++i) {
    const MixerOptions& mixer = model.mixers[i];
    if (mixer.moba.has_value()) continue;
    const auto mask =
        ops::BlockMask::Build(mixer.pattern, model.num_kv_heads, documents, blocks, blocks);
    scratch[i] = ops::AttentionBackwardScratch({.dtype = model.compute,
                                                .heads = model.num_heads,
                                                .kv_heads = model.num_kv_heads,
                                                .head_dim = model.head_dim},
                                               model.attention_implementation, *mask);
  }
  return scratch;
}

}  // namespace

std::optional<MemoryForecast> ForecastStepMemory(const ModelOptions& model, int64_t tokens,
                                                 DeviceKind device, int64_t rows,
                                                 const StateSharding& sharding) {
  if (model.gates_only) return std::nullopt;
  Meter meter;
  const std::vector<size_t> scratch = AttentionScratch(model, tokens, device, rows);
  ShadowTape tape(meter, model, tokens, rows, scratch);
  StateMemory state(model, sharding, [&](int64_t elements, DType dtype, MemoryCategory category) {
    return tape.Make(elements, dtype, category);
  });
  Forward(tape, state, device);
  tape.Backward();
  MemoryForecast forecast{meter.peak(), 0};
  for (const size_t bytes : forecast.by_category) forecast.bytes += bytes;
  return forecast;
}

}  // namespace longspan::trainer
