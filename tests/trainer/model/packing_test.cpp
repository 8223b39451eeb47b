// Balanced packing in whole runs: losses do not depend on how rows are dealt, runs go on exactly
// where they stopped, and replicas have even work.
#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "data/balance.h"
#include "data/sampler.h"
#include "parallel/comm/local.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/trainer.h"

namespace longspan::test {
namespace {

using namespace trainer;

constexpr int64_t kLength = 256, kRows = 8;  // of a step

class PackingTest : public ::testing::Test {
 protected:
  // Mostly short documents and some of several rows.
  PackingTest() {
    data::IndexWriter writer((folder_.path() / "train").string(),
                             data::TokenDTypeForVocabulary(19));
    const Philox rng(4, StreamOf("packing corpus"));
    uint64_t n = 0;
    for (int document = 0; document < 300; ++document) {
      const uint64_t most = document % 9 == 0 ? 3 * kLength : kLength / 4;
      std::vector<int32_t> ids(1 + rng.Below(n++, most));
      for (int32_t& id : ids) id = static_cast<int32_t>(rng.Below(n++, 19));
      writer.Append(ids);
      writer.EndDocument();
    }
    writer.Commit();
  }

  TrainOptions Options(bool balanced) const {
    TrainOptions o;
    o.model = SmallModel(DType::kF64);
    o.model.mixers = {{"causal", ops::AttentionPattern::Causal()}};
    o.model.layers = {0};
    o.steps = 6;
    o.context_length = kLength;
    o.global_batch_tokens = kRows * kLength;
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.balanced_packing = balanced;
    o.adamw.lr = 1e-2;
    return o;
  }

  // Rows as trained on, without the model.
  std::unique_ptr<data::RowSampler> Sampler(const TrainOptions& o) const {
    data::RowSamplerOptions s;
    s.sources = {{o.train[0].path, 1}};
    s.context_length = o.context_length;
    s.seed = o.seed;
    s.balanced = o.balanced_packing;
    return std::make_unique<data::RowSampler>(s);
  }

  struct Curve {
    std::vector<double> losses, norms, work;
    std::vector<int64_t> valid;
  };
  // Steps from `checkpoint` (empty: the beginning) until `end`; saved there when `save` names it.
  Curve Train(TrainOptions o, int dp, int cp, int64_t rows, int64_t end,
              const std::string& checkpoint = {}, const std::string& save = {}) const {
    o.dp = dp;
    o.cp = cp;
    o.micro_batch_rows = rows;
    Curve curve;
    std::mutex mutex;
    parallel::RunLocal(dp * cp, [&](parallel::Communicator& world) {
      parallel::DeviceMesh mesh(world, {.dp = dp, .cp = cp});
      Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
      Trainer trainer(ctx, mesh, o);
      if (!checkpoint.empty()) trainer.Resume(CheckpointReader::Open(folder_.path() / checkpoint));
      Curve mine;
      while (trainer.step() < end) {
        const StepResult step = trainer.Step();
        mine.losses.push_back(step.loss);
        mine.norms.push_back(step.grad_norm);
        mine.valid.push_back(step.valid_tokens);
        mine.work.push_back(step.work_max_over_mean);
      }
      if (!save.empty()) {
        CheckpointWriter writer({.directory = folder_.path() / save}, world);
        writer.Save(trainer.Info("config"), trainer.State());
        writer.Wait();
      }
      const std::lock_guard lock(mutex);
      curve = mine;
    });
    return curve;
  }

  static void ExpectNear(const Curve& got, const Curve& expected, size_t skip = 0) {
    ASSERT_EQ(got.losses.size() + skip, expected.losses.size());
    for (size_t i = 0; i < got.losses.size(); ++i) {
      EXPECT_NEAR(got.losses[i], expected.losses[i + skip], 1e-10 * expected.losses[i + skip]);
      EXPECT_NEAR(got.norms[i], expected.norms[i + skip], 1e-9 * expected.norms[i + skip]);
      EXPECT_EQ(got.valid[i], expected.valid[i + skip]);
    }
  }

  TemporaryFolder folder_;
};

TEST_F(PackingTest, LossesDoNotDependOnTheLayout) {
  const TrainOptions o = Options(true);
  const Curve one = Train(o, 1, 1, 1, o.steps);
  EXPECT_NE(one.losses, Train(Options(false), 1, 1, 1, o.steps).losses);
  EXPECT_EQ(one.work, std::vector<double>(one.work.size(), 1.0));
  for (const auto& [dp, cp, rows] :
       std::vector<std::array<int, 3>>{{1, 1, 4}, {2, 1, 1}, {2, 1, 2}, {4, 1, 2}, {2, 2, 1}}) {
    SCOPED_TRACE(Str("dp ", dp, " cp ", cp, " rows ", rows));
    ExpectNear(Train(o, dp, cp, rows, o.steps), one);
  }
}

TEST_F(PackingTest, RunsGoOnWhereTheyStopped) {
  const TrainOptions o = Options(true);
  const Curve whole = Train(o, 2, 1, 2, o.steps);
  Train(o, 2, 1, 2, 2, "", "saved");
  const Curve same = Train(o, 2, 1, 2, o.steps, "saved/step_00000002");
  EXPECT_EQ(same.losses, std::vector(whole.losses.begin() + 2, whole.losses.end()));
  EXPECT_EQ(same.norms, std::vector(whole.norms.begin() + 2, whole.norms.end()));
  EXPECT_EQ(same.work, std::vector(whole.work.begin() + 2, whole.work.end()));
  ExpectNear(Train(o, 4, 1, 1, o.steps, "saved/step_00000002"), whole, 2);
  try {
    Train(Options(false), 2, 1, 2, o.steps, "saved/step_00000002");
    FAIL() << "rows of another packing are other data";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("data.packing"), std::string::npos) << e.what();
  }
}

TEST_F(PackingTest, ReplicasHaveEvenWork) {
  double greedy_mean = 0, balanced_mean = 0;
  for (const bool balanced : {false, true}) {
    const TrainOptions o = Options(balanced);
    const Curve curve = Train(o, 4, 1, 1, o.steps);
    const auto sampler = Sampler(o);
    for (size_t s = 0; s < curve.work.size(); ++s) {
      double total = 0;
      std::vector<double> areas;
      for (int64_t i = 0; i < kRows; ++i) {
        areas.push_back(static_cast<double>(sampler->Area(static_cast<int64_t>(s) * kRows + i)));
        total += areas.back();
      }
      if (!balanced) {  // replica r works on rows r and r + 4
        double most = 0;
        for (size_t r = 0; r < 4; ++r) most = std::max(most, areas[r] + areas[r + 4]);
        EXPECT_NEAR(curve.work[s], 4 * most / total, 1e-12);
        greedy_mean += curve.work[s] / static_cast<double>(o.steps);
        continue;
      }
      // The rows of the step as they are dealt, and no others.
      const std::vector<int64_t> order =
          data::DealRows(std::vector<int64_t>(areas.begin(), areas.end()), 4, 1);
      std::vector<double> replica(4);
      for (size_t i = 0; i < order.size(); ++i) {
        replica[i % 4] += areas[static_cast<size_t>(order[i])];
      }
      EXPECT_NEAR(curve.work[s], 4 * *std::max_element(replica.begin(), replica.end()) / total,
                  1e-12);
      // No way to deal them is better than this.
      const double largest = *std::max_element(areas.begin(), areas.end());
      std::sort(areas.begin(), areas.end());
      const double best = std::max(1.0, 4 * (largest + areas.front()) / total);
      EXPECT_GE(curve.work[s], best - 1e-12);
      EXPECT_LT(curve.work[s], best + 0.1);
      balanced_mean += curve.work[s] / static_cast<double>(o.steps);
    }
  }
  std::printf("largest over mean work of 4 replicas: greedy %.3f, balanced %.3f\n", greedy_mean,
              balanced_mean);
  EXPECT_LT(balanced_mean - 1, 0.3 * (greedy_mean - 1));
}

}  // namespace
}  // namespace longspan::test
