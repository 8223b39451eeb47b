#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// The gate between two attention branches of a layer, one value a kv head (DuoAttention, arXiv
// 2410.10819): for query head h of group g = h / (Hq / Hkv)
//   o = alpha_g full + (1 - alpha_g) stream.
//
// Shapes    full, stream, o, d_out [T, Hq, D]; alpha, dalpha [Hkv]; Hq % Hkv == 0
// Dtypes    full, stream, o, d_out all f32, all bf16 or all f64; alpha, dalpha f32 (f64)
// Numerics  in f32 (f64), one rounding on store; alpha = 1 gives `full` and alpha = 0 `stream`
//           exactly where both are finite. Same bits for any number of threads
// Errors    InvalidArgument naming the op and its operands, before anything is written
// Devices   cpu, cuda (no f64: Unsupported)
Tensor DuoGateForward(Context& ctx, const Tensor& full, const Tensor& stream, const Tensor& alpha);

struct DuoGateGradients {
  Tensor full, stream;  // alpha d_out, (1 - alpha) d_out; undefined when not wanted
};
// ADDS sum over tokens, heads of the group and elements of d_out (full - stream) to `dalpha`,
// unless that is undefined.
DuoGateGradients DuoGateBackward(Context& ctx, const Tensor& d_out, const Tensor& full,
                                 const Tensor& stream, const Tensor& alpha, Tensor& dalpha,
                                 bool want_branches = true);

// A price on open gates, for losses that are summed over tokens and divided once by their number:
//   sums[kLossSum] += weight * valid * sum(alpha),  sums[kZLossSum] += valid * share * sum(alpha)
// with valid = sums[kValidSum]; the backward pass ADDS weight * valid to every element of dalpha.
// The derivative of |alpha| on [0, 1], its upper end at 0: what stays there is the business of the
// step that clamps. `sums` is that of ops/loss, f64 [kLossSums].
struct GatePenalty {
  double weight = 0;  // loss per token and unit of alpha
  double share = 0;   // 1 / number of gates of the model, so that the second sum is their mean
};
void GatePenaltyForward(Context& ctx, const Tensor& alpha, const GatePenalty& penalty,
                        Tensor& sums);
void GatePenaltyBackward(Context& ctx, const Tensor& sums, const GatePenalty& penalty,
                         Tensor& dalpha);

}  // namespace longspan::ops
