#pragma once
#include "ops/attention/attention.h"
#include "parallel/context/ulysses.h"

namespace longspan::parallel {

// Runs plans of ulysses and hybrid; see ulysses.h.

// What stays between the passes: this rank's heads at every step, tokens of the group.
struct UlyssesSaved {
  struct Step {
    Tensor q;     // [N, heads of the step, D]
    Tensor k, v;  // [N, kv heads that came with the step, D]; hybrid: [N, virtual kv heads, D]
    Tensor lse;   // [N, heads of the step]; softmax only
    Tensor kept;  // hybrid: of the program
  };
  std::vector<Step> steps;
};

struct UlyssesOutput {
  Tensor o, lse;  // of this rank's tokens, o in the dtype of q
  std::shared_ptr<const UlyssesSaved> saved;
};
// Shapes and dtypes as of ContextAttentionForward, which has checked them. Collective.
UlyssesOutput UlyssesForward(Context& ctx, Communicator& comm, const UlyssesPlan& plan,
                             const Tensor& q, const Tensor& k, const Tensor& v,
                             const ops::AttentionOptions& options);

struct UlyssesGrads {
  Tensor dq, dk, dv;  // dtype of q
};
// `delta` [T, Hq] as of AttentionBackward, undefined of sigmoid. Collective.
UlyssesGrads UlyssesBackward(Context& ctx, Communicator& comm, const UlyssesPlan& plan,
                             const Tensor& d_out, const Tensor& delta, const UlyssesSaved& saved,
                             DType dtype, const ops::AttentionOptions& options);

}  // namespace longspan::parallel
