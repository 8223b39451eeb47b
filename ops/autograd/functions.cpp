#include "ops/autograd/functions.h"

#include "ops/activation/gelu.h"
#include "ops/activation/swiglu.h"
#include "ops/elementwise/elementwise.h"
#include "ops/gemm/linear.h"
#include "ops/norm/rms_norm.h"

namespace longspan::autograd {

Var Linear(Tape& tape, const Var& x, const Parameter& w) {
  Context& ctx = tape.context();
  Var y(ops::LinearForward(ctx, x.value(), w.value), tape.recording());
  tape.Record([&ctx, x, w = w.value, dw = w.grad, y]() mutable {
    if (!y.grad().defined()) return;
    const Tensor dx = ops::LinearBackward(ctx, y.grad(), x.value(), w, dw, x.requires_grad());
    if (x.requires_grad()) x.AddGrad(ctx, dx);
  });
  return y;
}

Var Embedding(Tape& tape, const Tensor& ids, const Parameter& table, DType dtype,
              const ops::EmbeddingOrder& order) {
  Context& ctx = tape.context();
  Var y(ops::EmbeddingForward(ctx, ids, table.value, dtype), tape.recording());
  if (!table.grad.defined()) return y;
  tape.Record([&ctx, ids, order, dtable = table.grad, y]() mutable {
    if (y.grad().defined()) ops::EmbeddingBackward(ctx, ids, y.grad(), dtable, order);
  });
  return y;
}

Var RmsNorm(Tape& tape, const Var& x, const Parameter& w, double eps) {
  Context& ctx = tape.context();
  const auto result = ops::RmsNormForward(ctx, x.value(), w.value, eps);
  Var y(result.y, tape.recording());
  tape.Record([&ctx, x, w = w.value, dw = w.grad, rstd = result.rstd, y]() mutable {
    if (!y.grad().defined()) return;
    x.AddGrad(ctx, ops::RmsNormBackward(ctx, y.grad(), x.value(), w, rstd, dw));
  });
  return y;
}

Var Rope(Tape& tape, const Var& x, const ops::RopeTable& table) {
  Context& ctx = tape.context();
  Var y(ops::RopeForward(ctx, x.value(), table), tape.recording());
  tape.Record([&ctx, x, table, y] {
    if (y.grad().defined()) x.AddGrad(ctx, ops::RopeBackward(ctx, y.grad(), table));
  });
  return y;
}

Var SwiGlu(Tape& tape, const Var& gate, const Var& up) {
  Context& ctx = tape.context();
  Var y(ops::SwiGluForward(ctx, gate.value(), up.value()), tape.recording());
  tape.Record([&ctx, gate, up, y] {
    if (!y.grad().defined()) return;
    const auto grads = ops::SwiGluBackward(ctx, y.grad(), gate.value(), up.value());
    gate.AddGrad(ctx, grads.dgate);
    up.AddGrad(ctx, grads.dup);
  });
  return y;
}

Var Gelu(Tape& tape, const Var& x) {
  Context& ctx = tape.context();
  Var y(ops::GeluForward(ctx, x.value()), tape.recording());
  tape.Record([&ctx, x, y] {
    if (y.grad().defined()) x.AddGrad(ctx, ops::GeluBackward(ctx, y.grad(), x.value()));
  });
  return y;
}

Var Reshape(Tape& tape, const Var& x, Shape shape) {
  Context& ctx = tape.context();
  Var y(x.value().Reshape(shape), tape.recording());
  tape.Record([&ctx, x, y] {
    if (y.grad().defined()) x.AddGrad(ctx, y.grad().Reshape(x.value().shape()));
  });
  return y;
}

Var Cast(Tape& tape, const Var& x, DType dtype) {
  if (x.value().dtype() == dtype) return x;
  Context& ctx = tape.context();
  Var y(ops::Cast(ctx, x.value(), dtype), tape.recording());
  tape.Record([&ctx, x, y] {
    if (y.grad().defined()) x.AddGrad(ctx, ops::Cast(ctx, y.grad(), x.value().dtype()));
  });
  return y;
}

Var ResidualAdd(Tape& tape, const Var& x, const Var& branch) {
  Context& ctx = tape.context();
  Var y(ops::ResidualAdd(ctx, x.value(), branch.value()), tape.recording());
  tape.Record([&ctx, x, branch, y] {
    if (!y.grad().defined()) return;
    const DType narrow = branch.value().dtype();
    x.AddGrad(ctx, y.grad());
    branch.AddGrad(ctx, y.grad().dtype() == narrow ? y.grad() : ops::Cast(ctx, y.grad(), narrow));
  });
  return y;
}

ops::LinearCrossEntropyResult LinearCrossEntropy(Tape& tape, const Var& x, const Parameter& w,
                                                 const Tensor& labels,
                                                 const ops::LinearCrossEntropyOptions& options,
                                                 double scale) {
  Context& ctx = tape.context();
  const auto result = ops::LinearCrossEntropyForward(ctx, x.value(), w.value, labels, options);
  tape.Record([&ctx, x, w = w.value, dw = w.grad, labels, options, scale, result]() mutable {
    x.AddGrad(ctx, ops::LinearCrossEntropyBackward(ctx, result, x.value(), w, labels, options,
                                                   scale, dw));
  });
  return result;
}

}  // namespace longspan::autograd
