#pragma once
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/attention/kv_view.h"
#include "ops/core/context.h"

namespace longspan::ops {

// How the scores of the visible keys become weights.
enum class Normalization : uint8_t { kSoftmax, kSigmoid };

// Attention restricted to a block mask:
//   o_i = sum_j p_ij v_j,  s_ij = scale * q_i . k_j  over visible j, with the weights
//   softmax  p_ij = exp(s_ij - lse_i)
//   sigmoid  p_ij = 1 / (1 + exp(-s_ij - bias)), arXiv 2409.04431: no lse, no delta
//
// Shapes    q, o, do, dq [Tq, Hq, D]; lse, delta [Tq, Hq]; k, v through KvView; Hq % Hkv == 0,
//           query head h reads kv head h / (Hq / Hkv). Row i of q is token i of mask.queries().
// Dtypes    q, k, v all f32, all bf16, or all f64; o f32 (f64), or the dtype of q when
//           `round_output`; lse, delta, dlse f32 (f64), natural log. do that of o or of q;
//           dq, dk, dv f32 (f64).
// Numerics  f32 accumulation (f64 for f64), blocks before rows; exp within 3e-7, 0 below e^-103 at
//           the latest. Same bits for any number of threads. K and V of a block that is partly
//           visible must be finite throughout: hidden tokens are multiplied by 0.
//           1 - p of sigmoid is as exact as p. The entries named ..._bf16 round p and ds to bf16.
// Empty     a row that sees nothing gives o = 0 and lse = -inf, and contributes no gradient.
// Partials  results over disjoint key sets merge exactly (MergePartial) and the backward of each
//           part takes the final lse and delta; of sigmoid they add.
// Errors    InvalidArgument naming the argument, before anything is written; Unsupported for what
//           no implementation of the device takes (f64 or head_dim > 256 on a GPU).
// Devices   cpu, cuda: all tensors on ctx.device(); the mask and the tables are uploaded at their
//           first use and kept with them.
struct AttentionOptions {
  double scale = 0;            // 0: 1 / sqrt(D)
  std::string implementation;  // empty: the first that accepts; else this one or InvalidArgument
  bool round_output = false;   // o in the dtype of q (one rounding, for unsplit attention)
  // Forward only: also the largest probability of every block, over its query rows and keys and the
  // query heads of the kv head, without a tensor of tokens x tokens. On a CPU, f32 or f64
  // arithmetic. Softmax only.
  bool want_block_maxima = false;
  Normalization normalization = Normalization::kSoftmax;
  // Sigmoid only; absent: -log(tokens of the mask's row), with which the weights of a full row of
  // zero scores sum to about 1.
  std::optional<double> bias{};
};

struct AttentionResult {
  Tensor o;                    // [Tq, Hq, D]
  Tensor lse;                  // [Tq, Hq]; undefined of sigmoid
  const char* implementation;  // which entry ran
  // [Hkv, query blocks, key blocks] of the mask in the dtype of lse, 0 where it has no entry;
  // undefined unless asked for.
  Tensor block_maxima{};
};

AttentionResult AttentionForward(Context& ctx, const Tensor& q, const KvView& kv,
                                 const BlockMask& mask, const AttentionOptions& options = {});

// delta_i = sum_d do_id * o_id with the final o (any of its dtypes), [Tq, Hq] f32 (f64), from the
// values given. The entries named ..._bf16 round an f32 d_out to bf16 and leave delta as it is: ds
// = p (dp - delta) is then off by p times the rounding error of do . o, as much as by that of dp. A
// d_out in bf16 makes the two consistent.
Tensor AttentionDelta(Context& ctx, const Tensor& d_out, const Tensor& o);

// Adds this mask's share of the gradients: `dq` [Tq, Hq, D] and `dkv`. `lse` is the final one over
// all keys. `dlse` (optional, undefined = none) is the gradient with respect to lse. Of sigmoid,
// whose score gradient is p (1 - p) dp, all three are undefined.
void AttentionBackward(Context& ctx, const Tensor& d_out, const Tensor& q, const KvView& kv,
                       const Tensor& lse, const Tensor& delta, const BlockMask& mask, Tensor& dq,
                       const KvGradView& dkv, const AttentionOptions& options = {},
                       const Tensor& dlse = {});

// (o, lse) becomes the result over the union of two disjoint key sets; all f32 or all f64.
// Both lse = -inf: o = 0, lse = -inf.
void MergePartial(Context& ctx, Tensor& o, Tensor& lse, const Tensor& o2, const Tensor& lse2);

// The implementation table, for each device most specialised first, reference last:
//   amx_bf16        64 x 64 blocks, operands, probabilities and score gradients in bf16 with f32
//                   sums; head_dim a multiple of 8 up to 256, processors with AMX and AVX512-BF16
//   avx512_bf16     the same, processors with AVX512-BF16
//   avx512          64 x 64 blocks in f32, head_dim a multiple of 8 up to 256, processors with
//                   AVX-512
//   portable        the same blocks in plain vector code, head_dim up to 256
//   reference       token by token from Visible(), any head_dim; the only one for f64
//   mma_bf16        GPU, tensor cores: bf16 operands, head_dim a multiple of 8 up to 256 (128 where
//                   a block has less than 160 KB of shared memory: sm_86, sm_89, sm_120);
//                   probabilities and score gradients, and d_out, are rounded to bf16 where they
//                   are operands
//   reference_cuda  GPU, f32 products of f32 or bf16 operands, head_dim up to 256
struct AttentionProblem {
  DType dtype;
  int64_t heads, kv_heads, head_dim;
  bool block_maxima = false;  // AttentionOptions::want_block_maxima
  bool aligned = true;        // the rows of q, k, v (and d_out, dq) start at 16 bytes
  // GPU: shared memory that a block of threads can have (AttentionSharedBytes).
  int64_t shared_bytes = std::numeric_limits<int64_t>::max();
};
struct AttentionImplementation {
  const char* name;
  DeviceKind device;
  // Why this entry cannot run the problem here; empty when it can.
  std::string (*rejects)(const AttentionProblem& problem);
};
const std::vector<AttentionImplementation>& AttentionImplementations();
// Bytes of tensors that the backward pass of `problem` over `mask` makes for itself on a CPU, with
// this implementation (empty: the one that would be chosen), but for what each thread takes.
size_t AttentionBackwardScratch(const AttentionProblem& problem, const std::string& implementation,
                                const BlockMask& mask);
// AttentionProblem::shared_bytes on the device of `ctx`; no limit on a CPU.
int64_t AttentionSharedBytes(const Context& ctx);

}  // namespace longspan::ops
