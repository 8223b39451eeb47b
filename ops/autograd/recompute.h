#pragma once
#include <functional>
#include <vector>

#include "ops/autograd/tape.h"

namespace longspan::autograd {

using Segment = std::function<Var(Tape&, const std::vector<Var>&)>;

// Runs `segment` and keeps only its inputs and its output; the backward pass runs it again and
// differentiates that second run. One entry on the tape. The segment must be a pure function of its
// inputs and of parameters that do not change in between; its collectives are issued once more.
Var Recompute(Tape& tape, const std::vector<Var>& inputs, const Segment& segment);

}  // namespace longspan::autograd
