#include "trainer/eval/loss.h"

#include <algorithm>

#include "ops/elementwise/elementwise.h"

namespace longspan::trainer {
namespace {

// A row that weighs nothing: no labels, one document.
void AppendBlankRow(data::MicroBatch& batch) {
  const size_t n = static_cast<size_t>(batch.row_length);
  batch.tokens.insert(batch.tokens.end(), n, 0);
  batch.labels.insert(batch.labels.end(), n, -1);
  for (int64_t i = 0; i < batch.row_length; ++i) batch.positions.push_back(i);
  batch.doc_ends.push_back({batch.row_length});
}

void AppendRow(data::MicroBatch& batch, const data::Row& row) {
  batch.tokens.insert(batch.tokens.end(), row.tokens.begin(), row.tokens.end());
  batch.labels.insert(batch.labels.end(), row.labels.begin(), row.labels.end());
  batch.positions.insert(batch.positions.end(), row.positions.begin(), row.positions.end());
  batch.doc_ends.push_back(row.doc_ends);
}

}  // namespace

EvaluationLoss EvaluateLoss(Context& ctx, parallel::DeviceMesh& mesh, const TrainOptions& options,
                            ParameterStore& store, const data::RowSampler& sampler,
                            BatchBuilder& builder, int64_t rows) {
  const int64_t available = sampler.RowsAvailable();
  const int64_t total = rows > 0 ? std::min(rows, available) : available;
  const int64_t per_round = options.dp * options.micro_batch_rows;
  const int64_t replica = mesh.dp_index();
  Tensor sums = ctx.Zeros({ops::kLossSums}, DType::kF64);
  for (int64_t round = 0; round * per_round < total; ++round) {
    data::MicroBatch batch;
    batch.rows = options.micro_batch_rows;
    batch.row_length = options.context_length;
    for (int64_t i = 0; i < batch.rows; ++i) {
      const int64_t row = round * per_round + replica * options.micro_batch_rows + i;
      if (row < total) {
        AppendRow(batch, sampler.Get(row * available / total));
      } else {
        AppendBlankRow(batch);
      }
    }
    const LocalBatch local = ToDevice(ctx, builder.Build(batch)->local);
    autograd::Tape tape(ctx, /*recording=*/false);
    const auto loss = DecoderForward(tape, mesh.axis("cp"), options.model, store, local, {});
    ops::AddInto(ctx, sums, loss.sums);
  }
  mesh.world().AllReduce(sums, parallel::ReduceOp::kSum).Wait();
  const ops::LossSums s = ops::ReadLossSums(sums);
  return {s.valid > 0 ? s.loss / static_cast<double>(s.valid) : 0.0, s.valid, total};
}

}  // namespace longspan::trainer
