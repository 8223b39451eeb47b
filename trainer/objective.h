#pragma once
#include "trainer/model/decoder.h"
#include "trainer/options.h"

namespace longspan::trainer {

// What a step minimises, per token with a label:
//
//   next token   cross-entropy of the next token, plus the z-loss
//   duo gates    the gates of DuoAttention layers (arXiv 2410.10819), every other weight frozen:
//                  mean_t (1 / C) |x_t - y_t|^2 + regularization * mean |alpha|
//                with x the hidden states after the last norm, y those of the same model with open
//                gates (dense attention), C the hidden size, and t over tokens with a label
//
//   seer gates   the gates of SeerAttention layers (arXiv 2410.13276), every other weight frozen:
//   the
//                mean over layers, kv heads and rows of query blocks of KL(target || gate) with the
//                dense map's block maxima as target (ops/attention/seer_gate.h). Per row of query
//                blocks where the others are per token with a label; no collective, so cp = 1
//
// The forward pass over one micro-batch, recorded on `tape` with its root, so that tape.Backward()
// gives the gradient of the first of the sums. Returns the sums over this rank's tokens, f64
// [kLossSums] on the device, to be added over micro-batches and ranks and divided by the last:
//   kLossSum   the objective (without the z-loss)
//   kZLossSum  next token: the z-loss; duo gates: the mean of all alpha, once a token; seer gates:
//   0 kValidSum  tokens with a label; seer gates: rows of query blocks that count
Tensor ObjectiveForward(autograd::Tape& tape, parallel::Communicator& cp,
                        const ObjectiveOptions& objective, const ModelOptions& options,
                        ParameterStore& store, const LocalBatch& batch,
                        const BucketHook& bucket_ready);

// FLOP of one step's share of a token and of the attention of a (query, key, query head) triple, as
// the MFU counts them: 2 a matmul parameter and 4 head_dim a triple for a forward pass, twice that
// for the gradient. Gate training runs the dense pass as well and has no gradients of weights.
struct ObjectiveFlops {
  double per_token = 0;
  double per_pair = 0;       // of all branches
  double per_open_pair = 0;  // once more for those of the branches of open gates
};
ObjectiveFlops FlopsOf(const ObjectiveOptions& objective, const ModelOptions& options);

}  // namespace longspan::trainer
