#pragma once
#include <cstdint>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Cross-entropy of next-token labels, fused with the output projection and chunked over tokens:
//   logits_t = w x_t,  lse_t = log sum_v exp(logits_tv),
//   loss_t = lse_t - logits_t[label_t]  (nats),  z_t = z_loss * lse_t^2,
// summed over the tokens that have a label. At most `chunk_tokens` x V logits exist at a time; the
// backward pass computes them again, on a CPU as more tokens of fewer words.
//
// Shapes    x, dx [T, D]; w, dw [V, D]; labels [T]; lse, token_losses [T]
// Dtypes    x, w, dx: all f32, all bf16, or all f64; labels i32, -1 = no label; lse, token_losses
//           and dw f32 (f64 in f64 mode)
//           on a GPU no f64; sums f64
// Numerics  logits, lse and losses in f32 (f64) also for bf16 operands; the sums over tokens in f64
//           in a fixed order (on a CPU that of the tokens). dlogits are rounded to the dtype of x
//           before the two products. Same bits for any number of threads; `chunk_tokens` changes
//           the last bits only. A logit that is not finite (infinite of either sign, or NaN) makes
//           the loss of its token NaN or infinite.
// Errors    InvalidArgument naming the token, the label and V, before anything is written. On a GPU
//           labels cannot be looked at: one that is outside [-1, V) makes loss, lse and gradient of
//           its token NaN
// Devices   cpu, cuda
struct LinearCrossEntropyOptions {
  int64_t chunk_tokens = 0;        // 0: AutoChunkTokens
  double z_loss = 0;               // coefficient, >= 0
  bool want_token_losses = false;  // fill token_losses
};

struct LinearCrossEntropyResult {
  Tensor sums;          // f64 [kLossSums] on the device of the operands
  Tensor lse;           // saved for the backward pass; 0 where there is no label
  Tensor token_losses;  // loss_t, 0 where there is no label; undefined unless asked for
};
enum LossSum {
  kLossSum,   // nats, without the z-loss
  kZLossSum,  // of z_t
  kValidSum,  // tokens with a label; 0 is fine: both sums and all gradients are 0
  kLossSums
};

// The sums on the host. Waits for the device: not for use inside a training step.
struct LossSums {
  double loss = 0, z_loss = 0;
  int64_t valid = 0;
};
LossSums ReadLossSums(const Tensor& sums);

LinearCrossEntropyResult LinearCrossEntropyForward(Context& ctx, const Tensor& x, const Tensor& w,
                                                   const Tensor& labels,
                                                   const LinearCrossEntropyOptions& options = {});

// Gradient of scale * (loss + z-loss): ADDS that of w to `dw`, unless that is undefined
// (w is not trained), and returns dx. `saved` must come from the forward pass with the same x, w,
// labels and z_loss.
Tensor LinearCrossEntropyBackward(Context& ctx, const LinearCrossEntropyResult& saved,
                                  const Tensor& x, const Tensor& w, const Tensor& labels,
                                  const LinearCrossEntropyOptions& options, double scale,
                                  Tensor& dw);

// Tokens a chunk for a vocabulary of `vocab` when chunk_tokens is 0, a multiple of 64: about 32 MiB
// of logits on a CPU, where they should stay near its caches, and 1 GiB on a GPU, where each chunk
// reads all of w, and reads and writes all of dw.
int64_t AutoChunkTokens(int64_t vocab, DeviceKind device);

// Elements that the backward pass holds beside operands and results, with automatic chunks.
struct LinearCrossEntropyScratch {
  int64_t logits = 0;     // in the accumulator's dtype
  int64_t gradients = 0;  // of logits, in the dtype of x; 0 where they replace the logits
  int64_t sums = 0;       // for dx, in the accumulator's dtype
};
LinearCrossEntropyScratch BackwardScratch(int64_t tokens, int64_t width, int64_t vocab, DType dtype,
                                          DeviceKind device);

}  // namespace longspan::ops
