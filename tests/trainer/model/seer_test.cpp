// Models whose query blocks see what a learned gate chooses: the gate's gradient, what training it
// changes, and what it is used for.
#include <gtest/gtest.h>

#include <cmath>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/trainer.h"

namespace longspan::test {
namespace {

using namespace trainer;

constexpr int64_t kLength = 320;  // five blocks

ModelOptions SeerModel(DType dtype, const ops::SeerSelection& selection) {
  ModelOptions m = SmallModel(dtype);
  m.mixers = {{.name = "seer",
               .pattern = ops::AttentionPattern::Causal(),
               .seer = SeerOptions{.block_size = 64, .gate_dim = 6, .selection = selection}},
              {.name = "dense", .pattern = ops::AttentionPattern::Causal()}};
  m.layers = {0, 1, 0};
  m.gates_only = true;
  return m;
}
constexpr ObjectiveOptions Objective(bool drop) {
  return {.kind = ObjectiveKind::kSeerGates, .drop_first_quarter = drop};
}

// One row of two documents, and with `rows` 2 another one of one document.
data::MicroBatch MakeBatch(const ModelOptions& m, int64_t rows = 1) {
  data::MicroBatch batch;
  batch.rows = rows;
  batch.row_length = kLength;
  const Philox rng(5, StreamOf("seer batch"));
  uint64_t n = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const auto ends = row == 0 ? std::vector<int64_t>{100, kLength} : std::vector<int64_t>{kLength};
    int64_t begin = 0;
    for (const int64_t end : ends) {
      for (int64_t i = begin; i < end; ++i) {
        const auto vocab = static_cast<uint64_t>(m.vocab_size);
        batch.tokens.push_back(static_cast<int32_t>(rng.Below(n++, vocab)));
        batch.labels.push_back(i + 1 == end ? -1 : static_cast<int32_t>(rng.Below(n++, vocab)));
        batch.positions.push_back(i - begin);
      }
      begin = end;
    }
    batch.doc_ends.push_back(ends);
  }
  return batch;
}

struct OneModel {
  explicit OneModel(const ModelOptions& options, bool training = false)
      : m(options), store(ctx, m, training) {
    store.Initialize(11);
  }
  LocalBatch Prepare(const data::MicroBatch& batch) {
    BatchBuilder builder(
        m, parallel::Placement(parallel::PlacementKind::kZigzag, batch.rows, kLength, 1),
        parallel::StrategyKind::kRing, 0);
    prepared = builder.Build(batch);
    return prepared->local;
  }
  Tensor Hidden(const data::MicroBatch& batch, GateUse use = GateUse::kMixed) {
    autograd::Tape tape(ctx, false);
    return DecoderHidden(tape, self, m, store, Prepare(batch), {}, use).value();
  }
  Vec Sums(const LocalBatch& batch, bool drop, bool backward) {
    autograd::Tape tape(ctx, backward);
    const Vec sums = ToVec(ObjectiveForward(tape, self, Objective(drop), m, store, batch, {}));
    if (backward) tape.Backward();
    return sums;
  }
  ModelOptions m;
  Context ctx{ContextOptions{.threads = 2, .poison_buffers = true}};
  parallel::SelfCommunicator self;
  ParameterStore store;
  std::shared_ptr<PreparedBatch> prepared;
};

TEST(SeerModelTest, GradientOfTheGatesMatchesFiniteDifferences) {
  for (const bool recompute : {false, true}) {
    ModelOptions m = SeerModel(DType::kF64, {.top_k = 2});
    m.recompute_layers = recompute;  // gates are taught once
    OneModel one(m, true);
    const LocalBatch batch = one.Prepare(MakeBatch(m));
    const double loss = one.Sums(batch, true, true)[ops::kLossSum];
    EXPECT_GT(loss, 0.01);
    const Philox rng(3, StreamOf("entries"));
    uint64_t n = 0;
    int checked = 0;
    for (Bucket& bucket : one.store.buckets()) {
      const Vec grad = ToVec(bucket.grad);
      ASSERT_EQ(grad.size(), static_cast<size_t>(bucket.trained_end));
      for (int sample = 0; sample < 6 && bucket.trained_end > 0; ++sample) {
        const auto i = rng.Below(n++, static_cast<uint64_t>(bucket.trained_end));
        double& w = bucket.master.data<double>()[i];
        const double saved = w, step = 1e-5;
        w = saved + step;
        const double up = one.Sums(batch, true, false)[ops::kLossSum];
        w = saved - step;
        const double down = one.Sums(batch, true, false)[ops::kLossSum];
        w = saved;
        const double numeric = (up - down) / (2 * step);
        EXPECT_NEAR(grad[i], numeric, 1e-7 * std::max(1.0, std::abs(numeric))) << bucket.name;
        checked += std::abs(numeric) > 1e-3;
      }
    }
    EXPECT_GT(checked, 4);  // not only zeros
  }
}

// Rows of blocks count once, whatever the number of layers; the first quarter of each row does not.
TEST(SeerModelTest, RowsOfBlocksAreWhatCounts) {
  const ModelOptions m = SeerModel(DType::kF64, {.top_k = 2});
  OneModel one(m);
  const LocalBatch batch = one.Prepare(MakeBatch(m, 2));
  EXPECT_EQ(one.Sums(batch, false, false)[ops::kValidSum], 10);
  EXPECT_EQ(one.Sums(batch, true, false)[ops::kValidSum], 8);  // five blocks a row: one is dropped
  EXPECT_EQ(one.Sums(batch, false, false)[ops::kZLossSum], 0);
  // The loss is a mean over two layers of two kv heads.
  SeerLesson lesson{.weight = 1};
  autograd::Tape tape(one.ctx, false);
  DecoderHidden(tape, one.self, m, one.store, batch, {}, GateUse::kTaught, &lesson);
  EXPECT_NEAR(one.Sums(batch, false, false)[ops::kLossSum], lesson.loss / 4, 1e-12 * lesson.loss);
}

// The loss of one layer from its formulas: pooled by hand, turned at the places of the blocks,
// against the map of the attention that runs.
TEST(SeerModelTest, TeachingFollowsTheDefinition) {
  const ModelOptions m = SeerModel(DType::kF64, {.top_k = 2});
  constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 8, kGate = 6, kBlocks = 5;
  OneModel one(m);
  const data::MicroBatch batch = MakeBatch(m);  // documents of 100 and 220 tokens
  const LocalBatch local = one.Prepare(batch);
  const auto tensor = [&](int64_t heads, const Vec& values) {
    return FromVec(one.ctx, {kLength, heads, kDim}, DType::kF64, values);
  };
  const Vec plain_q = Normal(kLength * kHeads * kDim, 1),
            plain_k = Normal(kLength * kKvHeads * kDim, 2);
  const Vec q = Normal(kLength * kHeads * kDim, 3), k = Normal(kLength * kKvHeads * kDim, 4);
  const Vec wq = Normal(kKvHeads * kGate * kDim, 5), wk = Normal(kKvHeads * kGate * 3 * kDim, 6);
  const autograd::Parameter pq{"q", FromVec(one.ctx, {kKvHeads, kGate, kDim}, DType::kF64, wq), {}};
  const autograd::Parameter pk{
      "k", FromVec(one.ctx, {kKvHeads, kGate, 3 * kDim}, DType::kF64, wk), {}};
  using autograd::Var;
  SeerLesson lesson{.drop_first_quarter = true, .weight = 0.25};
  autograd::Tape tape(one.ctx, false);
  SeerTeach(tape, *local.seer_plans[0], *local.plans[0], {&pq, &pk}, Var(tensor(kHeads, plain_q)),
            Var(tensor(kKvHeads, plain_k)), Var(tensor(kHeads, q)), Var(tensor(kKvHeads, k)),
            Var(tensor(kKvHeads, k)), {}, lesson);

  const auto at = [](const Vec& x, int64_t heads, int64_t t, int64_t h, int64_t d) {
    return x[static_cast<size_t>((t * heads + h) * kDim + d)];
  };
  const auto sees = [](int64_t i, int64_t j) { return j <= i && (j < 100) == (i < 100); };
  // Rotates pairs (d, d + 3) by place * theta^(-d / 3).
  const auto turned = [&](const Vec& x, int64_t place) {
    Vec y(kGate);
    for (size_t d = 0; d < kGate / 2; ++d) {
      const double angle = static_cast<double>(place) *
                           std::pow(m.rope_theta, -2.0 * static_cast<double>(d) / kGate);
      y[d] = x[d] * std::cos(angle) - x[d + 3] * std::sin(angle);
      y[d + 3] = x[d + 3] * std::cos(angle) + x[d] * std::sin(angle);
    }
    return y;
  };
  double expected = 0;
  for (int64_t h = 0; h < kKvHeads; ++h) {
    std::vector<Vec> gate_q, gate_k;
    for (int64_t b = 0; b < kBlocks; ++b) {
      Vec query(kDim), key(3 * kDim);
      for (int64_t d = 0; d < kDim; ++d) {
        double most = -1e300, least = 1e300, sum = 0, mean = 0;
        for (int64_t t = 64 * b; t < 64 * b + 64; ++t) {
          const double x = at(plain_k, kKvHeads, t, h, d);
          most = std::max(most, x), least = std::min(least, x), sum += x;
          mean += at(plain_q, kHeads, t, 2 * h, d) + at(plain_q, kHeads, t, 2 * h + 1, d);
        }
        const auto c = static_cast<size_t>(d);
        query[c] = mean / 128, key[c] = most, key[c + kDim] = least, key[c + 2 * kDim] = sum / 64;
      }
      Vec gq(kGate), gk(kGate);
      for (size_t g = 0; g < kGate; ++g) {
        const size_t row = static_cast<size_t>(h) * kGate + g;
        for (size_t d = 0; d < kDim; ++d) gq[g] += wq[row * kDim + d] * query[d];
        for (size_t d = 0; d < 3 * kDim; ++d) gk[g] += wk[row * 3 * kDim + d] * key[d];
      }
      gate_q.push_back(turned(gq, b));
      gate_k.push_back(turned(gk, b));
    }
    std::vector<Vec> maxima(kBlocks, Vec(kBlocks));
    for (int64_t i = 0; i < kLength; ++i) {
      for (int64_t head = 2 * h; head < 2 * h + 2; ++head) {
        Vec p(kLength);
        double sum = 0;
        for (int64_t j = 0; j <= i; ++j) {
          if (!sees(i, j)) continue;
          double s = 0;
          for (int64_t d = 0; d < kDim; ++d)
            s += at(q, kHeads, i, head, d) * at(k, kKvHeads, j, h, d);
          sum += p[static_cast<size_t>(j)] = std::exp(s / std::sqrt(8.0));
        }
        for (int64_t j = 0; j <= i; ++j) {
          double& most = maxima[static_cast<size_t>(i / 64)][static_cast<size_t>(j / 64)];
          most = std::max(most, p[static_cast<size_t>(j)] / sum);
        }
      }
    }
    for (size_t i = 1; i < kBlocks; ++i) {  // the first of five blocks does not count
      const size_t first =
          i < 2 ? 0 : 1;  // block 1 holds the end of document 0, and the start of 1
      double gate = 0, target = 0;
      Vec score(kBlocks);
      for (size_t j = first; j <= i; ++j) {
        score[j] = Dot(gate_q[i], gate_k[j]) / std::sqrt(6.0);
        gate += std::exp(score[j]);
        target += maxima[i][j];
      }
      for (size_t j = first; j <= i; ++j) {
        const double share = maxima[i][j] / target;
        if (share > 0) expected += share * std::log(share * gate / std::exp(score[j]));
      }
    }
  }
  EXPECT_NEAR(lesson.loss, 0.25 * expected, 1e-10 * expected);
}

// A selection that keeps everything is the dense model, bit for bit; a smaller one is not.
TEST(SeerModelTest, KeepingEverythingIsDense) {
  for (const DType dtype : {DType::kF64, DType::kF32}) {
    ModelOptions all = SeerModel(dtype, {.top_k = 5});
    ModelOptions dense = all;
    dense.mixers[0] = {.name = "plain", .pattern = ops::AttentionPattern::Causal()};
    const data::MicroBatch batch = MakeBatch(all);
    OneModel gated(all), plain(dense);
    const Vec expected = ToVec(plain.Hidden(batch));
    EXPECT_EQ(ToVec(gated.Hidden(batch)), expected);
    OneModel few(SeerModel(dtype, {.top_k = 2}));
    EXPECT_GT(RelRms(ToVec(few.Hidden(batch)), expected), 1e-3);
    EXPECT_EQ(ToVec(few.Hidden(batch, GateUse::kOpen)), expected);
    OneModel low(SeerModel(dtype, {.threshold = 1e-30}));
    EXPECT_EQ(ToVec(low.Hidden(batch)), expected);
  }
}

// Gradients of everything else flow through the blocks chosen, with the choice held fixed.
TEST(SeerModelTest, NextTokenTrainsAroundTheGate) {
  ModelOptions m = SeerModel(DType::kF64, {.top_k = 2});
  m.gates_only = false;
  for (const bool recompute : {false, true}) {
    m.recompute_layers = recompute;
    OneModel one(m, true);
    const LocalBatch batch = one.Prepare(MakeBatch(m));
    const auto loss = [&](bool backward) {
      autograd::Tape tape(one.ctx, backward);
      const auto r = DecoderForward(tape, one.self, m, one.store, batch, {});
      if (backward) tape.Backward();
      return ops::ReadLossSums(r.sums).loss;
    };
    loss(true);
    Bucket& layer = one.store.buckets()[1];
    for (size_t p = 0; p < layer.specs.size(); ++p) {
      const bool gate = IsGateName(layer.specs[p].name);
      EXPECT_EQ(layer.parameters[p].grad.defined(), !gate) << layer.specs[p].name;
      if (gate) continue;
      const int64_t i = layer.offsets[p] + 3;
      double& w = layer.master.data<double>()[i];
      const double saved = w, step = 1e-7;  // so small that no block changes places
      w = saved + step;
      const double up = loss(false);
      w = saved - step;
      const double down = loss(false);
      w = saved;
      const double numeric = (up - down) / (2 * step);
      EXPECT_NEAR(layer.grad.data<double>()[i], numeric, 1e-4 * std::max(1.0, std::abs(numeric)))
          << layer.specs[p].name;
    }
  }
}

class SeerTrainingTest : public ::testing::Test {
 protected:
  SeerTrainingTest() { WriteCorpus((folder_.path() / "train").string(), 19, 100, 600, 1); }
  TrainOptions Options() const {
    TrainOptions o;
    o.model = SeerModel(DType::kF32, {.top_k = 2});
    o.objective = Objective(true);
    o.steps = 30;
    o.context_length = kLength;
    o.global_batch_tokens = 2 * kLength;
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.adamw.lr = 1e-2;
    return o;
  }
  TemporaryFolder folder_;
};

struct OneRun {
  explicit OneRun(const TrainOptions& options) : trainer(ctx, mesh, options) {}
  std::map<std::string, Vec> Weights(bool gates) {
    std::map<std::string, Vec> weights;
    for (const NamedTensor& t : trainer.State()) {
      if (t.name.starts_with("weights/") && IsGateName(t.name) == gates) {
        weights[t.name] = ToVec(t.tensor);
      }
    }
    return weights;
  }
  Context ctx{ContextOptions{.threads = 2, .poison_buffers = true}};
  parallel::SelfCommunicator world;
  parallel::DeviceMesh mesh{world, {.dp = 1, .cp = 1}};
  Trainer trainer;
};

TEST_F(SeerTrainingTest, GatesLearnAndNothingElseMoves) {
  OneRun run(Options());
  const auto frozen = run.Weights(false), gates = run.Weights(true);
  EXPECT_EQ(gates.size(), 4u);
  double first = 0, last = 0;
  while (run.trainer.step() < 30) {
    const StepResult r = run.trainer.Step();
    if (run.trainer.step() <= 5) first += r.loss / 5;
    if (run.trainer.step() > 25) last += r.loss / 5;
    EXPECT_FALSE(r.mean_gate.has_value());
    EXPECT_EQ(r.valid_tokens, 8);  // rows of blocks
  }
  EXPECT_LT(last, 0.8 * first);
  EXPECT_EQ(run.Weights(false), frozen);
  for (const auto& [name, values] : run.Weights(true)) EXPECT_NE(values, gates.at(name)) << name;
}

TEST_F(SeerTrainingTest, ReplicasTrainTheSameGates) {
  TrainOptions o = Options();
  o.model = SeerModel(DType::kF64, {.top_k = 2});
  o.steps = 3;
  OneRun one(o);
  Vec losses;
  while (one.trainer.step() < 3) losses.push_back(one.trainer.Step().loss);
  const auto expected = one.Weights(true);
  parallel::RunLocal(2, [&](parallel::Communicator& world) {
    parallel::DeviceMesh mesh(world, {.dp = 2, .cp = 1});
    Context ctx(ContextOptions{.threads = 1});
    TrainOptions two = o;
    two.dp = 2;
    Trainer trainer(ctx, mesh, two);
    for (const double loss : losses) EXPECT_NEAR(trainer.Step().loss, loss, 1e-11 * loss);
    for (const NamedTensor& t : trainer.State()) {
      if (!t.name.starts_with("weights/") || !IsGateName(t.name)) continue;
      EXPECT_LT(RelMax(ToVec(t.tensor), expected.at(t.name)), 1e-9) << t.name;
    }
  });
}

// The way of a user: a dense model, its gates, then training with the blocks they choose.
TEST_F(SeerTrainingTest, TaughtGatesAreUsedAndUntaughtOnesRefused) {
  TrainOptions dense = Options();
  dense.objective = {};
  dense.model.gates_only = false;
  dense.model.mixers.erase(dense.model.mixers.begin());
  dense.model.layers = {0, 0, 0};
  const auto saved = [&](OneRun& run, const char* name) {
    CheckpointWriter writer({.directory = folder_.path() / name}, run.world);
    writer.Save(run.trainer.Info("config"), run.trainer.State());
    writer.Wait();
    return CheckpointReader::Open(folder_.path() / name / Str("step_0000000", run.trainer.step()));
  };
  OneRun base(dense);
  base.trainer.Step();
  TrainOptions use = Options();
  use.objective = {};
  use.model.gates_only = false;
  use.seed = 3;
  {
    OneRun early(use);
    EXPECT_THROW(early.trainer.InitFrom(saved(base, "base")), CheckpointError);
  }
  OneRun gates(Options());
  gates.trainer.InitFrom(CheckpointReader::Open(folder_.path() / "base" / "step_00000001"));
  gates.trainer.Step();
  EXPECT_EQ(gates.Weights(false), base.Weights(false));
  OneRun used(use);
  used.trainer.InitFrom(saved(gates, "gates"));
  EXPECT_EQ(used.Weights(true), gates.Weights(true));
  used.trainer.Step();
  EXPECT_EQ(used.Weights(true), gates.Weights(true));  // frozen here
  EXPECT_NE(used.Weights(false), gates.Weights(false));
  // A resumed run goes on with the same bits.
  OneRun again(use);
  again.trainer.Resume(saved(used, "used"));
  used.trainer.Step();
  again.trainer.Step();
  EXPECT_EQ(again.Weights(false), used.Weights(false));
}

}  // namespace
}  // namespace longspan::test
