#pragma once
#include "ops/autograd/parameter.h"
#include "ops/autograd/tape.h"
#include "ops/embedding/embedding.h"
#include "ops/gate/duo_gate.h"
#include "ops/loss/linear_cross_entropy.h"
#include "ops/rope/rope.h"

namespace longspan::autograd {

// The ops of ops/ as entries of a tape, one entry a call. Shapes, dtypes and numerics are those of
// the op named; parameter gradients are added, activation gradients flow through Var. What depends
// on nothing that is trained (a parameter with a gradient, or a Var that requires one) makes no
// entry and a result that requires none: below the first trained layer nothing is kept or
// differentiated.

Var Linear(Tape& tape, const Var& x, const Parameter& w);  // gemm.h: x w^T
// `order`: of the ids, where EmbeddingBackward needs it.
Var Embedding(Tape& tape, const Tensor& ids, const Parameter& table, DType dtype,
              const ops::EmbeddingOrder& order = {});
Var RmsNorm(Tape& tape, const Var& x, const Parameter& w, double eps);
Var Rope(Tape& tape, const Var& x, const ops::RopeTable& table);
Var SwiGlu(Tape& tape, const Var& gate, const Var& up);
Var Gelu(Tape& tape, const Var& x);
Var Reshape(Tape& tape, const Var& x, Shape shape);
Var Cast(Tape& tape, const Var& x, DType dtype);
// x + branch in the dtype of x (the residual stream may be wider than the branch).
Var ResidualAdd(Tape& tape, const Var& x, const Var& branch);

// The root of a training step: sums of losses in nats, and an entry that starts the backward pass
// with d(loss + z-loss) = `scale`.
ops::LinearCrossEntropyResult LinearCrossEntropy(Tape& tape, const Var& x, const Parameter& w,
                                                 const Tensor& labels,
                                                 const ops::LinearCrossEntropyOptions& options,
                                                 double scale = 1.0);

// As Linear for each head h on its own: y_h = x_h w_h^T with x [H, N, K], w [H, M, K], y [H, N, M].
Var HeadLinear(Tape& tape, const Var& x, const Parameter& w);
// The gate between two attention branches (ops/gate/duo_gate.h).
Var DuoGate(Tape& tape, const Var& full, const Var& stream, const Parameter& alpha);
// Adds the price of open gates to `sums` and records its gradient.
void GatePenalty(Tape& tape, const Parameter& alpha, const ops::GatePenalty& penalty, Tensor& sums);
// The root of a step that trains gates: sums as of LinearCrossEntropy (ops/loss/hidden_distance.h),
// and an entry that starts the backward pass with d(loss) = 1.
Tensor HiddenDistance(Tape& tape, const Var& x, const Tensor& target, const Tensor& labels);

}  // namespace longspan::autograd
