#pragma once
#include <memory>

#include "ops/attention/moba.h"
#include "ops/autograd/tape.h"

namespace longspan::autograd {

// MobaForward / Backward as one entry of a tape; the result in the dtype of q, rounded once. The
// choice of blocks is that of the forward pass and has no gradient.
Var Moba(Tape& tape, std::shared_ptr<const ops::MobaPlan> plan, const Var& q, const Var& k,
         const Var& v, const ops::AttentionOptions& options = {});

}  // namespace longspan::autograd
