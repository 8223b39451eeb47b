#include "ops/autograd/functions.h"

#include <algorithm>
#include <initializer_list>

#include "ops/activation/gelu.h"
#include "ops/activation/swiglu.h"
#include "ops/elementwise/elementwise.h"
#include "ops/gemm/gemm.h"
#include "ops/gemm/linear.h"
#include "ops/loss/hidden_distance.h"
#include "ops/norm/rms_norm.h"

namespace longspan::autograd {
namespace {

// Whether a result that was made from these takes part in the backward pass.
bool Differentiated(const Tape& tape, std::initializer_list<const Var*> inputs,
                    const Parameter* w = nullptr) {
  const auto requires_grad = [](const Var* x) { return x->requires_grad(); };
  return tape.recording() && ((w != nullptr && w->WantsGrad()) ||
                              std::any_of(inputs.begin(), inputs.end(), requires_grad));
}

}  // namespace

Var Linear(Tape& tape, const Var& x, const Parameter& w) {
  Context& ctx = tape.context();
  Var y(ops::LinearForward(ctx, x.value(), w.value), Differentiated(tape, {&x}, &w));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, x, &w, y] {
    if (!y.grad().defined()) return;
    Tensor dw = w.grad;
    const Tensor dx = ops::LinearBackward(ctx, y.grad(), x.value(), w.value, dw, x.requires_grad());
    if (x.requires_grad()) x.AddGrad(ctx, dx);
  });
  return y;
}

Var Embedding(Tape& tape, const Tensor& ids, const Parameter& table, DType dtype,
              const ops::EmbeddingOrder& order) {
  Context& ctx = tape.context();
  Var y(ops::EmbeddingForward(ctx, ids, table.value, dtype), Differentiated(tape, {}, &table));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, ids, order, &table, y] {
    if (!y.grad().defined()) return;
    Tensor dtable = table.grad;
    ops::EmbeddingBackward(ctx, ids, y.grad(), dtable, order);
  });
  return y;
}

Var RmsNorm(Tape& tape, const Var& x, const Parameter& w, double eps) {
  Context& ctx = tape.context();
  const auto result = ops::RmsNormForward(ctx, x.value(), w.value, eps);
  Var y(result.y, Differentiated(tape, {&x}, &w));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, x, &w, rstd = result.rstd, y] {
    if (!y.grad().defined()) return;
    Tensor dw = w.grad;
    x.AddGrad(ctx, ops::RmsNormBackward(ctx, y.grad(), x.value(), w.value, rstd, dw));
  });
  return y;
}

Var Rope(Tape& tape, const Var& x, const ops::RopeTable& table) {
  Context& ctx = tape.context();
  Var y(ops::RopeForward(ctx, x.value(), table), Differentiated(tape, {&x}));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, x, table, y] {
    if (y.grad().defined()) x.AddGrad(ctx, ops::RopeBackward(ctx, y.grad(), table));
  });
  return y;
}

Var SwiGlu(Tape& tape, const Var& gate, const Var& up) {
  Context& ctx = tape.context();
  Var y(ops::SwiGluForward(ctx, gate.value(), up.value()), Differentiated(tape, {&gate, &up}));
  if (!y.requires_grad()) return y;
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
  Var y(ops::GeluForward(ctx, x.value()), Differentiated(tape, {&x}));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, x, y] {
    if (y.grad().defined()) x.AddGrad(ctx, ops::GeluBackward(ctx, y.grad(), x.value()));
  });
  return y;
}

Var Reshape(Tape& tape, const Var& x, Shape shape) {
  Context& ctx = tape.context();
  Var y(x.value().Reshape(shape), Differentiated(tape, {&x}));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, x, y] {
    if (y.grad().defined()) x.AddGrad(ctx, y.grad().Reshape(x.value().shape()));
  });
  return y;
}

Var Cast(Tape& tape, const Var& x, DType dtype) {
  if (x.value().dtype() == dtype) return x;
  Context& ctx = tape.context();
  Var y(ops::Cast(ctx, x.value(), dtype), Differentiated(tape, {&x}));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, x, y] {
    if (y.grad().defined()) x.AddGrad(ctx, ops::Cast(ctx, y.grad(), x.value().dtype()));
  });
  return y;
}

Var ResidualAdd(Tape& tape, const Var& x, const Var& branch) {
  Context& ctx = tape.context();
  Var y(ops::ResidualAdd(ctx, x.value(), branch.value()), Differentiated(tape, {&x, &branch}));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, x, branch, y] {
    if (!y.grad().defined()) return;
    const DType narrow = branch.value().dtype();
    x.AddGrad(ctx, y.grad());
    if (!branch.requires_grad()) return;
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
  if (!Differentiated(tape, {&x}, &w)) return result;
  tape.Record([&ctx, x, &w, labels, options, scale, result] {
    Tensor dw = w.grad;
    x.AddGrad(ctx, ops::LinearCrossEntropyBackward(ctx, result, x.value(), w.value, labels, options,
                                                   scale, dw));
  });
  return result;
}

Var HeadLinear(Tape& tape, const Var& x, const Parameter& w) {
  Context& ctx = tape.context();
  const Tensor &in = x.value(), &weight = w.value;
  LONGSPAN_CHECK(in.rank() == 3 && weight.rank() == 3 && in.dim(0) == weight.dim(0) &&
                 in.dim(2) == weight.dim(2))
      << "HeadLinear: x " << in.Describe() << " and w " << weight.Describe()
      << " do not fit (y = x w^T for each head)";
  const auto head = [](const Tensor& t, int64_t h) {
    return t.Rows(h, h + 1).Reshape({t.dim(1), t.dim(2)});
  };
  Var y(ctx.Empty({in.dim(0), in.dim(1), weight.dim(1)}, in.dtype()),
        Differentiated(tape, {&x}, &w));
  for (int64_t h = 0; h < in.dim(0); ++h) {
    Tensor out = head(y.value(), h);
    ops::Gemm(ctx, head(in, h), false, head(weight, h), true, out);
  }
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, head, x, &w, y] {
    if (!y.grad().defined()) return;
    const bool want_dx = x.requires_grad();
    const Tensor dx = want_dx ? ctx.Empty(x.value().shape(), x.value().dtype()) : Tensor();
    for (int64_t h = 0; h < y.value().dim(0); ++h) {
      const Tensor dy = head(y.grad(), h);
      if (w.grad.defined()) {
        Tensor sum = head(w.grad, h);
        ops::Gemm(ctx, dy, true, head(x.value(), h), false, sum, {.accumulate = true});
      }
      if (!want_dx) continue;
      Tensor out = head(dx, h);
      ops::Gemm(ctx, dy, false, head(w.value, h), false, out);
    }
    if (want_dx) x.AddGrad(ctx, dx);
  });
  return y;
}

Var DuoGate(Tape& tape, const Var& full, const Var& stream, const Parameter& alpha) {
  Context& ctx = tape.context();
  Var y(ops::DuoGateForward(ctx, full.value(), stream.value(), alpha.value),
        Differentiated(tape, {&full, &stream}, &alpha));
  if (!y.requires_grad()) return y;
  tape.Record([&ctx, full, stream, &alpha, y] {
    if (!y.grad().defined()) return;
    Tensor dgate = alpha.grad;
    const bool branches = full.requires_grad() || stream.requires_grad();
    const auto grads = ops::DuoGateBackward(ctx, y.grad(), full.value(), stream.value(),
                                            alpha.value, dgate, branches);
    if (!branches) return;
    full.AddGrad(ctx, grads.full);
    stream.AddGrad(ctx, grads.stream);
  });
  return y;
}

void GatePenalty(Tape& tape, const Parameter& alpha, const ops::GatePenalty& penalty,
                 Tensor& sums) {
  Context& ctx = tape.context();
  ops::GatePenaltyForward(ctx, alpha.value, penalty, sums);
  if (!Differentiated(tape, {}, &alpha)) return;
  tape.Record([&ctx, penalty, sums, &alpha] {
    Tensor dgate = alpha.grad;
    ops::GatePenaltyBackward(ctx, sums, penalty, dgate);
  });
}

Tensor HiddenDistance(Tape& tape, const Var& x, const Tensor& target, const Tensor& labels) {
  Context& ctx = tape.context();
  const Tensor sums = ops::HiddenDistanceForward(ctx, x.value(), target, labels);
  if (!Differentiated(tape, {&x})) return sums;
  tape.Record([&ctx, x, target, labels] {
    x.AddGrad(ctx, ops::HiddenDistanceBackward(ctx, x.value(), target, labels, 1.0));
  });
  return sums;
}

}  // namespace longspan::autograd
