#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "ops/autograd/functions.h"
#include "parallel/comm/communicator.h"
#include "parallel/context/plan.h"
#include "trainer/model/parameters.h"

namespace longspan::trainer {

// This rank's part of one micro-batch: its tokens in placement order.
struct LocalBatch {
  Tensor ids;                 // i32 [T]
  Tensor labels;              // i32 [T], -1 = none
  ops::EmbeddingOrder order;  // of the ids
  ops::RopeTable rope;        // of the tokens' positions in their documents
  std::vector<std::shared_ptr<const parallel::AttentionPlan>> plans;  // one per mixer
};

// Called once per bucket, in reverse order of the forward pass, when the backward pass of one
// micro-batch has added everything to that bucket's gradients.
using BucketHook = std::function<void(size_t bucket)>;

// Forward pass of the decoder over one micro-batch; recorded on `tape` when that records. `cp` is
// the communicator of the context-parallel axis. Returns the loss sums of this rank's tokens.
ops::LinearCrossEntropyResult DecoderForward(autograd::Tape& tape, parallel::Communicator& cp,
                                             const ModelOptions& options, ParameterStore& store,
                                             const LocalBatch& batch,
                                             const BucketHook& bucket_ready,
                                             bool want_token_losses = false);

}  // namespace longspan::trainer
