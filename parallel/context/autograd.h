#pragma once
#include <memory>

#include "ops/autograd/tape.h"
#include "parallel/context/routed.h"
#include "parallel/context/strategy.h"

namespace longspan::parallel {

// ContextAttentionForward / Backward as one entry of a tape; none when neither q nor k nor v
// requires a gradient. `comm` must outlive the tape. A recomputed segment can keep the result of
// the forward pass (KeptKind::kAttention), with all that the strategy needs for the backward pass.
autograd::Var ContextAttention(autograd::Tape& tape, Communicator& comm,
                               std::shared_ptr<const AttentionPlan> plan, const autograd::Var& q,
                               const autograd::Var& k, const autograd::Var& v,
                               const ops::AttentionOptions& options = {});

// The same of RoutedContextForward / Backward. A recomputed segment that keeps attention keeps the
// choice as well, and received keys where they stay.
autograd::Var RoutedContextAttention(autograd::Tape& tape, Communicator& comm,
                                     std::shared_ptr<const RoutedPlan> plan, const autograd::Var& q,
                                     const autograd::Var& k, const autograd::Var& v,
                                     const ops::AttentionOptions& options = {});

}  // namespace longspan::parallel
