// The whole model against finite differences in f64, with the sequence on two ranks.
#include <gtest/gtest.h>

#include <cmath>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/batch.h"
#include "trainer/model/decoder.h"

namespace longspan::test {
namespace {

using namespace trainer;

constexpr int64_t kLength = 512;

data::MicroBatch MakeBatch(const ModelOptions& m, int64_t rows) {
  data::MicroBatch batch;
  batch.rows = rows;
  batch.row_length = kLength;
  const Philox rng(5, StreamOf("gradient batch"));
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<int64_t> ends =
        r == 0 ? std::vector<int64_t>{70, 71, 300, kLength} : std::vector<int64_t>{kLength};
    int64_t begin = 0;
    for (int64_t end : ends) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t index = static_cast<uint64_t>(r * kLength + i);
        const uint64_t vocab = static_cast<uint64_t>(m.vocab_size);
        batch.tokens.push_back(static_cast<int32_t>(rng.Below(2 * index, vocab)));
        const bool last = i + 1 == end && end != kLength;
        batch.labels.push_back(last ? -1 : static_cast<int32_t>(rng.Below(2 * index + 1, vocab)));
        batch.positions.push_back(i - begin);
      }
      begin = end;
    }
    batch.doc_ends.push_back(ends);
  }
  return batch;
}

double Loss(Context& ctx, parallel::Communicator& comm, const ModelOptions& m,
            ParameterStore& store, const LocalBatch& batch, bool backward) {
  autograd::Tape tape(ctx, backward);
  const auto r = DecoderForward(tape, comm, m, store, batch, {});
  if (backward) tape.Backward();
  const ops::LossSums sums = ops::ReadLossSums(r.sums);
  return sums.loss + sums.z_loss;
}

// Gradients summed over `ranks` ranks of the cp axis, one vector per bucket.
std::vector<Vec> Gradients(const ModelOptions& m, const data::MicroBatch& batch, int ranks,
                           parallel::StrategyKind strategy) {
  std::vector<Vec> total;
  std::mutex mutex;
  parallel::RunLocal(ranks, [&](parallel::Communicator& comm) {
    Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
    ParameterStore store(ctx, m, true);
    store.Initialize(11);
    const parallel::Placement placement(parallel::PlacementKind::kZigzag, batch.rows, kLength,
                                        ranks);
    BatchBuilder builder(m, placement, strategy, comm.rank());
    Loss(ctx, comm, m, store, builder.Build(batch)->local, true);
    std::lock_guard lock(mutex);
    for (size_t b = 0; b < store.buckets().size(); ++b) {
      const Vec g = ToVec(store.buckets()[b].grad);
      if (total.size() <= b) total.push_back(Vec(g.size()));
      for (size_t i = 0; i < g.size(); ++i) total[b][i] += g[i];
    }
  });
  return total;
}

void CheckAgainstFiniteDifferences(const ModelOptions& m, parallel::StrategyKind strategy) {
  const data::MicroBatch batch = MakeBatch(m, 1);
  const auto gradients = Gradients(m, batch, 2, strategy);

  Context ctx(ContextOptions{.threads = 1});
  parallel::SelfCommunicator self;
  ParameterStore store(ctx, m, true);
  store.Initialize(11);
  BatchBuilder builder(m, parallel::Placement(parallel::PlacementKind::kZigzag, 1, kLength, 1),
                       parallel::StrategyKind::kRing, 0);
  const auto prepared = builder.Build(batch);
  const Philox rng(3, StreamOf("entries"));
  uint64_t n = 0;
  for (size_t b = 0; b < store.buckets().size(); ++b) {
    Bucket& bucket = store.buckets()[b];
    for (size_t p = 0; p < bucket.specs.size(); ++p) {
      const int64_t size = bucket.specs[p].shape.numel();
      for (int sample = 0; sample < 4; ++sample) {
        const size_t i = static_cast<size_t>(
            bucket.offsets[p] + static_cast<int64_t>(rng.Below(n++, static_cast<uint64_t>(size))));
        double& w = bucket.master.data<double>()[i];
        const double saved = w, step = 1e-5;
        w = saved + step;
        const double up = Loss(ctx, self, m, store, prepared->local, false);
        w = saved - step;
        const double down = Loss(ctx, self, m, store, prepared->local, false);
        w = saved;
        const double numeric = (up - down) / (2 * step);
        EXPECT_NEAR(gradients[b][i], numeric, 1e-5 * std::max(1.0, std::abs(numeric)))
            << bucket.specs[p].name << " element " << i - static_cast<size_t>(bucket.offsets[p]);
      }
    }
  }
}

TEST(WholeModelGradientTest, RingOnTwoRanks) {
  CheckAgainstFiniteDifferences(SmallModel(DType::kF64), parallel::StrategyKind::kRing);
}

TEST(WholeModelGradientTest, GeluTiedRecomputedWithZLossOnAllGather) {
  ModelOptions m = SmallModel(DType::kF64);
  m.mlp = MlpKind::kGelu;
  m.tie_embeddings = true;
  m.recompute_layers = true;
  m.z_loss = 1e-2;
  CheckAgainstFiniteDifferences(m, parallel::StrategyKind::kAllGather);
}

// A sigmoid layer in front of a softmax layer; grouped heads, documents, two ranks.
ModelOptions SigmoidModel() {
  ModelOptions m = SmallModel(DType::kF64);
  m.mixers[0].normalization = ops::Normalization::kSigmoid;
  return m;
}

TEST(WholeModelGradientTest, SigmoidWithTheBiasOfTheRowOnTheRing) {
  CheckAgainstFiniteDifferences(SigmoidModel(), parallel::StrategyKind::kRing);
}

TEST(WholeModelGradientTest, SigmoidInEveryLayerRecomputedOnAllGather) {
  ModelOptions m = SigmoidModel();
  m.mixers[0].bias = -1.25;  // many weights near 1/2, where the gradient of the score is largest
  m.mixers[1].normalization = ops::Normalization::kSigmoid;
  m.recompute_layers = true;
  CheckAgainstFiniteDifferences(m, parallel::StrategyKind::kAllGather);
}

// Finite differences would not see options that do not reach attention.
TEST(WholeModelGradientTest, NormalizationAndBiasReachTheLayer) {
  Context ctx(ContextOptions{.threads = 1});
  parallel::SelfCommunicator self;
  const auto loss = [&](const ModelOptions& m) {
    ParameterStore store(ctx, m, true);
    store.Initialize(11);
    BatchBuilder builder(m, parallel::Placement(parallel::PlacementKind::kZigzag, 1, kLength, 1),
                         parallel::StrategyKind::kRing, 0);
    return Loss(ctx, self, m, store, builder.Build(MakeBatch(m, 1))->local, false);
  };
  ModelOptions m = SigmoidModel();
  const double derived = loss(m);
  EXPECT_GT(std::abs(derived / loss(SmallModel(DType::kF64)) - 1), 1e-4);
  m.mixers[0].bias = -2;
  EXPECT_GT(std::abs(derived / loss(m) - 1), 1e-4);
  m.mixers[0].bias = -std::log(static_cast<double>(kLength));
  EXPECT_EQ(derived, loss(m));
  // MFU counts the same work.
  const auto pairs = [](const ModelOptions& m) {
    BatchBuilder builder(m, parallel::Placement(parallel::PlacementKind::kZigzag, 1, kLength, 1),
                         parallel::StrategyKind::kRing, 0);
    return builder.Build(MakeBatch(m, 1))->attention_pairs;
  };
  EXPECT_EQ(pairs(m), pairs(SmallModel(DType::kF64)));
}

TEST(WholeModelGradientTest, GatesAreForSoftmaxOnly) {
  const auto build = [](const ModelOptions& m) {
    BatchBuilder(m, parallel::Placement(parallel::PlacementKind::kZigzag, 1, kLength, 1),
                 parallel::StrategyKind::kRing, 0);
  };
  EXPECT_NO_THROW(build(SigmoidModel()));
  ModelOptions duo = SigmoidModel(), seer = SigmoidModel(), moba = SigmoidModel();
  duo.mixers[0].duo = {4, 20};
  seer.mixers[0].seer = SeerOptions{};
  moba.mixers[0].moba = ops::MobaOptions{};
  for (const ModelOptions& m : {duo, seer, moba}) EXPECT_THROW(build(m), Error);
}

// Micro-batches add up: two rows at once equal the sum of nothing but their own gradients.
TEST(WholeModelGradientTest, RecomputeGivesTheSameBits) {
  ModelOptions m = SmallModel(DType::kF64);
  const data::MicroBatch batch = MakeBatch(m, 2);
  const auto kept = Gradients(m, batch, 2, parallel::StrategyKind::kRing);
  m.recompute_layers = true;
  EXPECT_EQ(kept, Gradients(m, batch, 2, parallel::StrategyKind::kRing));
}

TEST(WholeModelGradientTest, RanksAndRowsDoNotMatter) {
  const ModelOptions m = SmallModel(DType::kF64);
  const data::MicroBatch batch = MakeBatch(m, 2);
  const auto one = Gradients(m, batch, 1, parallel::StrategyKind::kRing);
  for (int ranks : {2, 4}) {
    for (auto strategy : {parallel::StrategyKind::kRing, parallel::StrategyKind::kAllGather}) {
      const auto many = Gradients(m, batch, ranks, strategy);
      for (size_t b = 0; b < one.size(); ++b) EXPECT_LT(RelMax(many[b], one[b]), 1e-12);
    }
  }
}

}  // namespace
}  // namespace longspan::test
