#include "ops/autograd/recompute.h"

namespace longspan::autograd {

Var Recompute(Tape& tape, const std::vector<Var>& inputs, const Segment& segment) {
  Tape silent(tape.context(), /*recording=*/false);
  const Var first_run = segment(silent, inputs);
  if (!tape.recording()) return first_run;

  Var output(first_run.value(), /*requires_grad=*/true);
  tape.Record([&ctx = tape.context(), inputs, segment, output] {
    Tape inner(ctx);
    std::vector<Var> fresh;
    for (const Var& input : inputs) fresh.emplace_back(input.value(), input.requires_grad());
    const Var again = segment(inner, fresh);
    if (output.grad().defined()) again.AddGrad(ctx, output.grad());
    inner.Backward();
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (fresh[i].grad().defined()) inputs[i].AddGrad(ctx, fresh[i].grad());
    }
  });
  return output;
}

}  // namespace longspan::autograd
