#pragma once
#include <deque>
#include <memory>

#include "data/loader.h"
#include "ops/attention/documents.h"
#include "parallel/context/placement.h"
#include "trainer/model/decoder.h"

namespace longspan::trainer {

// A LocalBatch and what the step reports about it.
struct PreparedBatch {
  LocalBatch local;
  // (query, key, query head) triples that attention evaluates on this rank, summed over layers: the
  // attention share of the MFU formula.
  double attention_pairs = 0;
};

// Turns micro-batches of the loader into this rank's part: picks the tokens of its placement,
// builds RoPE tables and attention plans. Plans are cached by documents, so rows without document
// borders are planned once. Owns a single-threaded Context, because it runs in the loader's thread
// while the step computes. One thread at a time.
class BatchBuilder {
 public:
  BatchBuilder(const ModelOptions& model, parallel::Placement placement,
               parallel::StrategyKind strategy, int cp_rank);

  std::shared_ptr<PreparedBatch> Build(const data::MicroBatch& batch);

 private:
  struct Plans {
    std::shared_ptr<const ops::Documents> documents;
    std::vector<std::shared_ptr<const parallel::AttentionPlan>> per_mixer;
    double attention_pairs;
  };
  Plans PlansFor(std::shared_ptr<const ops::Documents> documents);

  const ModelOptions model_;
  const parallel::Placement placement_;
  const parallel::StrategyKind strategy_;
  const int cp_rank_;
  Context ctx_;
  std::deque<Plans> cache_;  // most recent first
};

}  // namespace longspan::trainer
