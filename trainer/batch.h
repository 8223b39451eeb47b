#pragma once
#include <deque>
#include <memory>
#include <utility>

#include "data/loader.h"
#include "ops/attention/documents.h"
#include "parallel/context/placement.h"
#include "trainer/model/decoder.h"

namespace longspan::trainer {

// A LocalBatch in host memory and what the step reports about it.
struct PreparedBatch {
  LocalBatch local;
  // (query, key, query head) triples that attention evaluates on this rank, summed over layers: the
  // attention share of the MFU formula. Routed layers count with MobaPlan::NominalPairs.
  double attention_pairs = 0;
  // Those that are left when gates are open (GateUse::kOpen): of full branches, of dense attention.
  double open_pairs = 0;
};

// The batch with its tensors on the device of `ctx`: `host` itself on a CPU, else copies that are
// made in the order of the compute stream, without waiting for it while the batch before last has
// arrived there: pinned memory holds two batches of the largest size seen. The host's may go at
// once.
LocalBatch ToDevice(Context& ctx, const LocalBatch& host);

// Turns micro-batches of the loader into this rank's part: picks the tokens of its placement,
// builds RoPE tables and attention plans. Plans are cached by documents, so rows without document
// borders are planned once. Owns a single-threaded Context, because it runs in the loader's thread
// while the step computes. One thread at a time.
//
// Errors    DataError naming a token id or label that model.vocab_size does not cover
class BatchBuilder {
 public:
  // strategy.heads is that of the model.
  BatchBuilder(const ModelOptions& model, parallel::Placement placement,
               parallel::StrategyOptions strategy, int cp_rank);
  BatchBuilder(const ModelOptions& model, parallel::Placement placement,
               parallel::StrategyKind strategy, int cp_rank)
      : BatchBuilder(model, std::move(placement), parallel::StrategyOptions{.kind = strategy},
                     cp_rank) {}

  std::shared_ptr<PreparedBatch> Build(const data::MicroBatch& batch);
  Trace& trace() { return ctx_.trace(); }  // "prepare batch"

 private:
  struct Plans {
    std::shared_ptr<const ops::Documents> documents;
    std::vector<std::shared_ptr<const parallel::AttentionPlan>> per_mixer;
    std::vector<std::shared_ptr<const parallel::AttentionPlan>> stream_per_mixer;
    std::vector<std::shared_ptr<const ops::MobaPlan>> moba_per_mixer;
    std::vector<std::shared_ptr<const SeerPlan>> seer_per_mixer;
    double attention_pairs, open_pairs;
  };
  Plans PlansFor(std::shared_ptr<const ops::Documents> documents);

  const ModelOptions model_;
  const std::shared_ptr<const parallel::Placement> placement_;
  parallel::StrategyOptions strategy_;
  const int cp_rank_;
  Context ctx_;
  std::deque<Plans> cache_;  // most recent first
};

}  // namespace longspan::trainer
