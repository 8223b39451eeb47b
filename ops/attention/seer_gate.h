#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/core/context.h"

namespace longspan::ops {

// The block gate of SeerAttention (arXiv 2410.13276). For blocks I (queries) and J (keys) of
// block_size tokens of the row's grid and kv head h, before RoPE:
//   q_I = mean over tokens of I and query heads of h's group,  k_J = [max, min, mean] over tokens
//   of J A_IJ = softmax over J of (W_q q_I) . (W_k k_J) / sqrt(G), after RoPE at the blocks'
//   places,
// where J runs over the blocks up to I with a token that a token of I sees. The maps and RoPE are
// ops of their own; here are the pooling, the loss that teaches the gate, and the choice it makes.
//
// Shapes    q [T, Hq, D], k [T, Hkv, D]; pooled queries [Hkv, N, D] and keys [Hkv, N, 3 D]; gate
//           queries and keys [Hkv, N, G]; N blocks of all rows
// Dtypes    f32, bf16, f64, all operands of a call alike
// Numerics  in f32 (f64), one rounding on store; same bits for any number of threads
// Errors    InvalidArgument naming the op and its operands; Unsupported on a GPU
// Devices   cpu

// Blocks of a micro-batch and which of them may see each other.
struct SeerBlocks {
  int64_t rows = 0, row_length = 0, block_size = 0;  // block_size: as IsChoiceBlock
  std::vector<int32_t> first_key;  // [N] block n sees tokens of blocks first_key[n] ... n

  static SeerBlocks Of(const Documents& documents, int64_t block_size);
  int64_t per_row() const { return (row_length + block_size - 1) / block_size; }
  int64_t count() const { return rows * per_row(); }
};

struct SeerPooled {
  Tensor queries, keys;
};
SeerPooled SeerPool(Context& ctx, const Tensor& q, const Tensor& k, const SeerBlocks& blocks);

// Teaches the gate where the dense attention looks: the sum over kv heads and counted rows I of
//   KL(t_I || A_I),  t_IJ = m_IJ / sum_J m_IJ,
// with m_IJ the largest probability of block (I, J): `block_maxima` of AttentionForward over whole
// rows, [Hkv, 64-token blocks, 64-token blocks] in f32 (f64). Rows of the first `skip` blocks of
// each row of the batch do not count. Gradients with respect to the gate's queries and keys are
// those of weight * sum, [Hkv, N, G] in their dtype.
struct SeerLoss {
  double sum = 0;
  Tensor dq, dk;
};
SeerLoss SeerDistill(Context& ctx, const Tensor& gate_q, const Tensor& gate_k,
                     const Tensor& block_maxima, const SeerBlocks& blocks, int64_t skip,
                     double weight);
// Rows of one kv head that count with this `skip`.
int64_t SeerCountedRows(const SeerBlocks& blocks, int64_t skip);

// What the gate leaves to each 64-token query block: always its own block and the first one that it
// may see, and of the others the `top_k` - 2 largest A (ties: the lower block), or those with A >=
// threshold. Exactly one of the two is set.
struct SeerSelection {
  int64_t top_k = 0;             // blocks, >= 1; the two that are always seen count
  double threshold = 0;          // in (0, 1)
  std::string ToString() const;  // "top_k 16", "threshold 0.002"
};
KeptBlocks SeerSelect(Context& ctx, const Tensor& gate_q, const Tensor& gate_k,
                      const SeerBlocks& blocks, const SeerSelection& selection);

}  // namespace longspan::ops
