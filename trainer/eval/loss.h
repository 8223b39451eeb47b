#pragma once
#include <cstdint>

#include "data/sampler.h"
#include "parallel/mesh/device_mesh.h"
#include "trainer/batch.h"
#include "trainer/options.h"

namespace longspan::trainer {

struct EvaluationLoss {
  double loss = 0;  // nats per valid token over all rows
  int64_t valid_tokens = 0;
  int64_t rows = 0;
};

// Mean loss over `rows` rows of `sampler` (0 = all), spread evenly over it, in whatever layout:
// rows are dealt to the replicas and a last incomplete round is filled with rows that have no
// labels, so every row counts once. Collective. Forward passes only.
EvaluationLoss EvaluateLoss(Context& ctx, parallel::DeviceMesh& mesh, const TrainOptions& options,
                            ParameterStore& store, const data::RowSampler& sampler,
                            BatchBuilder& builder, int64_t rows);

}  // namespace longspan::trainer
