#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/attention/moba.h"
#include "ops/attention/pattern.h"
#include "ops/attention/seer_gate.h"
#include "ops/core/dtype.h"

namespace longspan::trainer {

enum class MlpKind { kSwiGlu, kGelu };

// A layer whose kv heads choose between full and streaming attention by trained gates
// (DuoAttention, arXiv 2410.10819): o = alpha o_full + (1 - alpha) o_stream, one alpha in [0, 1] a
// kv head.
struct DuoOptions {
  int64_t sinks = 0;   // the streaming branch: first tokens of the document,
  int64_t recent = 0;  // and the last tokens, the query's own included
  ops::AttentionPattern Stream() const { return ops::AttentionPattern::Window(recent, sinks); }
};

// A layer whose query blocks see the key blocks that a learned gate chooses (SeerAttention, arXiv
// 2410.13276; ops/attention/seer_gate.h).
struct SeerOptions {
  int64_t block_size = 64;  // tokens, a multiple of 64
  int64_t gate_dim = 64;    // elements of the gate's queries and keys, even
  ops::SeerSelection selection;
};

// How a layer mixes tokens: attention over a pattern. Gates and routing are for softmax only.
struct MixerOptions {
  std::string name;
  ops::AttentionPattern pattern;  // duo: of the full branch
  double scale = 0;               // 0: 1 / sqrt(head_dim)
  ops::Normalization normalization = ops::Normalization::kSoftmax;
  std::optional<double> bias{};  // of sigmoid; absent: that of AttentionOptions
  std::optional<DuoOptions> duo{};
  std::optional<SeerOptions> seer{};       // `pattern` is causal
  std::optional<ops::MobaOptions> moba{};  // routed: `pattern` is not used

  bool IsSigmoid() const { return normalization == ops::Normalization::kSigmoid; }
  ops::AttentionOptions Attention() const;

  // What tells two kinds apart, with every digit: "s2 block 64 local 4 stride 4", "duo sinks 128
  // recent 256", "sigmoid bias -8.5 causal".
  std::string ToString() const;
  std::string PatternToString() const;  // without the normalization
};

// Enough for matrix products at full speed: packing the weights of each costs 1.6 % of it.
inline constexpr int64_t kMlpTileTokens = 4096;

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
  std::vector<int> layers;               // index into mixers, one per layer
  std::string attention_implementation;  // AttentionOptions::implementation of all mixers

  DType compute = DType::kF32;   // weights as used, activations
  DType residual = DType::kF32;  // residual stream
  bool recompute_layers = false;
  bool keep_attention = false;  // of recomputed layers: attention is not run again
  // Tokens of a rank that the MLP works on at a time, which also makes the backward pass compute it
  // again; 0: kMlpTileTokens where layers are recomputed anyway, else all.
  int64_t mlp_tile_tokens = 0;
  bool gates_only = false;  // only the gates of mixers are trained, all other weights are frozen

  int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }
  // Tokens of an MLP tile of `tokens` in all; that many or more: it runs on all of them at once.
  int64_t MlpTile(int64_t tokens) const {
    if (mlp_tile_tokens > 0) return mlp_tile_tokens;
    return recompute_layers ? kMlpTileTokens : tokens;
  }
};

}  // namespace longspan::trainer
