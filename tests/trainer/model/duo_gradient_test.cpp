// The gates of a whole model: what open and closed ones compute, and their gradient against finite
// differences with the sequence on several ranks.
#include <gtest/gtest.h>

#include <cmath>
#include <mutex>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/duo_support.h"
#include "trainer/batch.h"

namespace longspan::test {
namespace {

using namespace trainer;
using parallel::StrategyKind;

constexpr int64_t kLength = 512, kSinks = 5, kRecent = 70;

// Documents of 70, 1, 229 and 212 tokens; each one's last token has no label.
data::MicroBatch MakeBatch(const ModelOptions& m, int64_t rows) {
  data::MicroBatch batch;
  batch.rows = rows;
  batch.row_length = kLength;
  const Philox rng(5, StreamOf("duo batch"));
  uint64_t n = 0;
  const auto vocab = static_cast<uint64_t>(m.vocab_size);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t begin = 0;
    for (const int64_t end : {int64_t{70}, int64_t{71}, int64_t{300}, kLength}) {
      for (int64_t i = begin; i < end; ++i) {
        batch.tokens.push_back(static_cast<int32_t>(rng.Below(n++, vocab)));
        batch.labels.push_back(i + 1 == end ? -1 : static_cast<int32_t>(rng.Below(n++, vocab)));
        batch.positions.push_back(i - begin);
      }
      begin = end;
    }
    batch.doc_ends.push_back({70, 71, 300, kLength});
  }
  return batch;
}

// Different gates in every layer and head, none at its end.
void SetGates(ParameterStore& store, const std::function<double(int64_t)>& value) {
  int64_t n = 0;
  for (Bucket& b : store.buckets()) {
    for (size_t i = 0; i < b.specs.size(); ++i) {
      if (!b.specs[i].gate) continue;
      for (int64_t h = 0; h < b.specs[i].shape.numel(); ++h) {
        const double alpha = value(n++);
        DispatchFloat(b.master.dtype(), "SetGates", [&]<class T>() {
          if constexpr (!std::is_same_v<T, BF16>) {
            b.master.data<T>()[b.offsets[i] + h] = static_cast<T>(alpha);
          }
        });
      }
    }
  }
  ASSERT_GT(n, 0);
}
double SpreadGate(int64_t n) { return 0.15 + 0.2 * static_cast<double>(n); }

double Objective(Context& ctx, parallel::Communicator& comm, const ModelOptions& m,
                 ParameterStore& store, const LocalBatch& batch, bool backward) {
  autograd::Tape tape(ctx, backward);
  const Tensor sums = ObjectiveForward(tape, comm, DuoObjective(0.3), m, store, batch, {});
  if (backward) tape.Backward();
  return ToVec(sums)[ops::kLossSum];
}

struct Gradients {
  double loss = 0;
  std::vector<Vec> buckets;
};

Gradients GradientsOn(const ModelOptions& m, const data::MicroBatch& batch, int ranks,
                      StrategyKind strategy) {
  Gradients total;
  std::mutex mutex;
  parallel::RunLocal(ranks, [&](parallel::Communicator& comm) {
    Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
    ParameterStore store(ctx, m, true);
    store.Initialize(11);
    SetGates(store, SpreadGate);
    const parallel::Placement placement(parallel::PlacementKind::kZigzag, batch.rows, kLength,
                                        ranks);
    BatchBuilder builder(m, placement, strategy, comm.rank());
    const double loss = Objective(ctx, comm, m, store, builder.Build(batch)->local, true);
    std::lock_guard lock(mutex);
    total.loss += loss;
    total.buckets.resize(store.buckets().size());
    for (size_t b = 0; b < store.buckets().size(); ++b) {
      const Vec g = ToVec(store.buckets()[b].grad);
      total.buckets[b].resize(g.size());
      for (size_t i = 0; i < g.size(); ++i) total.buckets[b][i] += g[i];
    }
  });
  return total;
}

// One rank with everything at hand.
struct OneModel {
  explicit OneModel(const ModelOptions& options) : m(options), store(ctx, m, false) {
    store.Initialize(11);
  }
  Tensor Hidden(const data::MicroBatch& batch) {
    BatchBuilder builder(
        m, parallel::Placement(parallel::PlacementKind::kZigzag, batch.rows, kLength, 1),
        StrategyKind::kRing, 0);
    autograd::Tape tape(ctx, false);
    return DecoderHidden(tape, self, m, store, builder.Build(batch)->local, {}).value();
  }
  ModelOptions m;
  Context ctx{ContextOptions{.threads = 2}};
  parallel::SelfCommunicator self;
  ParameterStore store;
};

void CheckAgainstFiniteDifferences(const ModelOptions& m, StrategyKind strategy) {
  const data::MicroBatch batch = MakeBatch(m, 1);
  const Gradients gradients = GradientsOn(m, batch, 2, strategy);
  OneModel one(m);
  SetGates(one.store, SpreadGate);
  BatchBuilder builder(m, parallel::Placement(parallel::PlacementKind::kZigzag, 1, kLength, 1),
                       StrategyKind::kRing, 0);
  const auto prepared = builder.Build(batch);
  const auto loss = [&] {
    return Objective(one.ctx, one.self, m, one.store, prepared->local, false);
  };
  EXPECT_NEAR(gradients.loss, loss(), 1e-10 * gradients.loss);
  int checked = 0;
  for (size_t b = 0; b < one.store.buckets().size(); ++b) {
    Bucket& bucket = one.store.buckets()[b];
    ASSERT_EQ(gradients.buckets[b].size(), static_cast<size_t>(bucket.trained_end)) << bucket.name;
    for (int64_t i = 0; i < bucket.trained_end; ++i) {
      double& alpha = bucket.master.data<double>()[i];
      const double saved = alpha, step = 1e-5;
      alpha = saved + step;
      const double up = loss();
      alpha = saved - step;
      const double down = loss();
      alpha = saved;
      const double numeric = (up - down) / (2 * step);
      EXPECT_NEAR(gradients.buckets[b][static_cast<size_t>(i)], numeric,
                  1e-6 * std::max(1.0, std::abs(numeric)))
          << bucket.name << " gate " << i;
      ++checked;
    }
  }
  EXPECT_EQ(checked, 4);
}

TEST(DuoGradientTest, RingOnTwoRanks) {
  CheckAgainstFiniteDifferences(GatedModel(DType::kF64, kSinks, kRecent), StrategyKind::kRing);
}

TEST(DuoGradientTest, RecomputedOnAllGather) {
  ModelOptions m = GatedModel(DType::kF64, kSinks, kRecent);
  m.recompute_layers = true;
  CheckAgainstFiniteDifferences(m, StrategyKind::kAllGather);
}

TEST(DuoGradientTest, RecomputeGivesTheSameBits) {
  ModelOptions m = GatedModel(DType::kF64, kSinks, kRecent);
  const data::MicroBatch batch = MakeBatch(m, 2);
  const Gradients kept = GradientsOn(m, batch, 2, StrategyKind::kRing);
  m.recompute_layers = true;
  const Gradients again = GradientsOn(m, batch, 2, StrategyKind::kRing);
  EXPECT_EQ(kept.loss, again.loss);
  EXPECT_EQ(kept.buckets, again.buckets);
}

TEST(DuoGradientTest, RanksAndRowsDoNotMatter) {
  const ModelOptions m = GatedModel(DType::kF64, kSinks, kRecent);
  const data::MicroBatch batch = MakeBatch(m, 2);
  const Gradients one = GradientsOn(m, batch, 1, StrategyKind::kRing);
  for (const int ranks : {2, 4}) {
    for (const auto strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
      const Gradients many = GradientsOn(m, batch, ranks, strategy);
      EXPECT_NEAR(many.loss, one.loss, 1e-11 * one.loss);
      for (size_t b = 0; b < one.buckets.size(); ++b) {
        EXPECT_LT(RelMax(many.buckets[b], one.buckets[b]), 1e-11);
      }
    }
  }
}

// Open gates are the causal model and closed ones the window model, bit for bit.
TEST(DuoGradientTest, EndsOfTheGatesAreTheModelsWithoutThem) {
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    const ModelOptions gated = GatedModel(dtype, kSinks, kRecent);
    ModelOptions plain = gated;
    plain.gates_only = false;
    plain.mixers[0] = {.name = "plain", .pattern = ops::AttentionPattern::Causal()};
    const data::MicroBatch batch = MakeBatch(gated, 1);
    OneModel with(gated), causal(plain);
    const Vec open = ToVec(with.Hidden(batch));
    EXPECT_EQ(open, ToVec(causal.Hidden(batch))) << ToString(dtype);

    plain.mixers[0].pattern = ops::AttentionPattern::Window(kRecent, kSinks);
    OneModel window(plain);
    SetGates(with.store, [](int64_t) { return 0.0; });
    const Vec closed = ToVec(with.Hidden(batch));
    EXPECT_EQ(closed, ToVec(window.Hidden(batch))) << ToString(dtype);
    EXPECT_GT(RelRms(closed, open), 1e-2);
  }
}

// With open gates nothing but their price is left; the mean of the gates is reported once a token.
TEST(DuoGradientTest, OpenGatesCostTheirPrice) {
  const ModelOptions m = GatedModel(DType::kF64, kSinks, kRecent);
  OneModel one(m);
  BatchBuilder builder(m, parallel::Placement(parallel::PlacementKind::kZigzag, 1, kLength, 1),
                       StrategyKind::kRing, 0);
  const auto prepared = builder.Build(MakeBatch(m, 1));
  const auto sums = [&] {
    autograd::Tape tape(one.ctx, false);
    return ToVec(
        ObjectiveForward(tape, one.self, DuoObjective(0.3), m, one.store, prepared->local, {}));
  };
  const double valid = kLength - 4;
  const Vec open = sums();
  EXPECT_NEAR(open[ops::kLossSum], 0.3 * valid, 1e-9);
  EXPECT_NEAR(open[ops::kZLossSum], valid, 1e-9);
  EXPECT_EQ(open[ops::kValidSum], valid);
  SetGates(one.store, [](int64_t n) { return n == 0 ? 1.0 : 0.5; });
  const Vec mixed = sums();
  EXPECT_NEAR(mixed[ops::kZLossSum], 0.625 * valid, 1e-9);
  EXPECT_GT(mixed[ops::kLossSum], 0.3 * 0.625 * valid);
}

}  // namespace
}  // namespace longspan::test
