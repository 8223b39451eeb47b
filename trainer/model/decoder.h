#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "ops/autograd/functions.h"
#include "parallel/comm/communicator.h"
#include "parallel/context/plan.h"
#include "parallel/context/routed_plan.h"
#include "trainer/model/parameters.h"
#include "trainer/model/seer.h"

namespace longspan::trainer {

// This rank's part of one micro-batch: its tokens in placement order.
struct LocalBatch {
  Tensor ids;                 // i32 [T]
  Tensor labels;              // i32 [T], -1 = none
  ops::EmbeddingOrder order;  // of the ids
  ops::RopeTable rope;        // of the tokens' positions in their documents
  std::vector<std::shared_ptr<const parallel::AttentionPlan>> plans;  // one per mixer
  std::vector<std::shared_ptr<const SeerPlan>> seer_plans{};  // null for mixers without such a gate
  // The same as plans for the streaming branch; null for mixers that have none.
  std::vector<std::shared_ptr<const parallel::AttentionPlan>> stream_plans{};
  // One per mixer; null unless it is routed, and then plans has null.
  std::vector<std::shared_ptr<const parallel::RoutedPlan>> moba_plans{};
};

// Called once per bucket, in reverse order of the forward pass, when the backward pass of one
// micro-batch has added everything to that bucket's gradients.
using BucketHook = std::function<void(size_t bucket)>;

// What layers with gates compute. kMixed: what the gates say, the mixture of both branches or the
// blocks chosen. kOpen: as if the gates were open, dense attention. kTaught: dense attention from
// which the gates of SeerAttention learn.
enum class GateUse { kMixed, kOpen, kTaught };

// Forward pass of the decoder over one micro-batch up to the last norm; recorded on `tape` when
// that records. `cp` is the communicator of the context-parallel axis. Returns the hidden states of
// this rank's tokens, [T, hidden_size] in the compute dtype. `lesson`: of kTaught.
autograd::Var DecoderHidden(autograd::Tape& tape, parallel::Communicator& cp,
                            const ModelOptions& options, ParameterStore& store,
                            const LocalBatch& batch, const BucketHook& bucket_ready,
                            GateUse gates = GateUse::kMixed, SeerLesson* lesson = nullptr);

// The same and the output projection with the loss of next tokens. Returns the loss sums of this
// rank's tokens.
ops::LinearCrossEntropyResult DecoderForward(autograd::Tape& tape, parallel::Communicator& cp,
                                             const ModelOptions& options, ParameterStore& store,
                                             const LocalBatch& batch,
                                             const BucketHook& bucket_ready,
                                             bool want_token_losses = false);

}  // namespace longspan::trainer
