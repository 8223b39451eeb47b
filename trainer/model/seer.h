#pragma once
#include <memory>

#include "ops/attention/seer_gate.h"
#include "ops/autograd/functions.h"
#include "parallel/comm/communicator.h"
#include "parallel/context/plan.h"
#include "trainer/model/options.h"

namespace longspan::trainer {

// What a SeerAttention layer knows about a micro-batch before any activation.
struct SeerPlan {
  ops::SeerBlocks blocks;
  ops::RopeTable
      rope;  // at the places of the blocks in their row, once a kv head: [Hkv * N, G / 2]

  // Blocks of the causal triangle that a selection of `top_k` keeps, as a share of all of them.
  double KeptShare(const ops::SeerSelection& selection) const;
};
std::shared_ptr<const SeerPlan> MakeSeerPlan(Context& ctx, const ModelOptions& model,
                                             const SeerOptions& seer,
                                             const ops::Documents& documents);

// What the gates of all layers are taught in one forward pass (ops/attention/seer_gate.h).
struct SeerLesson {
  bool drop_first_quarter = false;  // the first quarter of each row's query blocks does not count
  double weight = 0;                // of one kv head of one layer
  double loss = 0;                  // weight * sums of KL so far

  int64_t Skip(const ops::SeerBlocks& blocks) const {
    return drop_first_quarter ? blocks.per_row() / 4 : 0;
  }
};

struct SeerWeights {
  const autograd::Parameter* q;  // [Hkv, G, D]
  const autograd::Parameter* k;  // [Hkv, G, 3 D]
};

// Attention of q, k, v [T, heads, D] after RoPE over the blocks that the gate chooses; the gate
// looks at `plain_q` and `plain_k`, before RoPE, and gets no gradient from here.
autograd::Var SeerAttention(autograd::Tape& tape, parallel::Communicator& cp, const SeerPlan& plan,
                            const parallel::AttentionPlan& causal,
                            const ops::SeerSelection& selection, const SeerWeights& weights,
                            const autograd::Var& plain_q, const autograd::Var& plain_k,
                            const autograd::Var& q, const autograd::Var& k, const autograd::Var& v,
                            const ops::AttentionOptions& options);

// Dense attention, from which the gate learns: adds to lesson.loss and records the gradient of its
// weights. Nothing flows back to the operands, which must not require it.
autograd::Var SeerTeach(autograd::Tape& tape, const SeerPlan& plan,
                        const parallel::AttentionPlan& causal, const SeerWeights& weights,
                        const autograd::Var& plain_q, const autograd::Var& plain_k,
                        const autograd::Var& q, const autograd::Var& k, const autograd::Var& v,
                        const ops::AttentionOptions& options, SeerLesson& lesson);

}  // namespace longspan::trainer
