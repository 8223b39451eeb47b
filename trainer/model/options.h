#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/attention/pattern.h"
#include "ops/core/dtype.h"

namespace longspan::trainer {

enum class MlpKind { kSwiGlu, kGelu };

// How a layer mixes tokens. Softmax attention over a pattern; further kinds join here.
struct MixerOptions {
  std::string name;
  ops::AttentionPattern pattern;
  double scale = 0;  // 0: 1 / sqrt(head_dim)
};

// A Llama-style decoder: pre-norm layers of attention and MLP, RoPE, RMSNorm.
struct ModelOptions {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t ffn_hidden_size = 0;
  MlpKind mlp = MlpKind::kSwiGlu;
  double norm_eps = 1e-5;
  bool tie_embeddings = false;
  double init_std = 0.02;
  double embedding_init_std = 0.02;  // of the token embedding
  double rope_theta = 10000;
  double z_loss = 0;  // coefficient of the mean squared log-sum-exp
  std::vector<MixerOptions> mixers;
  std::vector<int> layers;  // index into mixers, one per layer

  DType compute = DType::kF32;   // weights as used, activations
  DType residual = DType::kF32;  // residual stream
  bool recompute_layers = false;

  int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }
};

}  // namespace longspan::trainer
