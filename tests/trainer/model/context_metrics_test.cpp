// What metrics.jsonl says of attention over several ranks, against counts by hand: bytes and times
// of a step are those of all its micro-batches and ranks, and of nothing else.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "parallel/comm/counting.h"
#include "parallel/comm/faulty.h"
#include "parallel/comm/local.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/loop.h"

namespace longspan::test {
namespace {

using namespace trainer;
using Json = nlohmann::json;

constexpr int64_t kLength = 256, kRanks = 2, kLayers = 2;

class ContextMetricsTest : public ::testing::Test {
 protected:
  ContextMetricsTest() { WriteCorpus((folder_.path() / "train").string(), 19, 100, 150, 1); }

  TrainOptions Options(int64_t micro_batches) const {
    TrainOptions o;
    o.model = SmallModel(DType::kF32);
    o.model.mixers = {{"causal", ops::AttentionPattern::Causal()}};
    o.model.layers.assign(kLayers, 0);
    o.steps = 3;
    o.context_length = kLength;
    o.global_batch_tokens = micro_batches * kLength;
    o.cp = kRanks;
    o.placement = parallel::PlacementKind::kContiguous;
    o.strategy.kind = parallel::StrategyKind::kExchange;
    o.document_mask = false;
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.validation = o.train;
    o.evaluation_rows = 3;
    o.adamw.lr = 1e-3;
    return o;
  }

  // The lines of the steps. Rank 1 sleeps so long before each of its operations.
  std::vector<Json> Train(const TrainOptions& o, double delay_s = 0) const {
    const auto directory = folder_.path() / "run";
    std::filesystem::remove_all(directory);
    parallel::RunLocal(kRanks, [&](parallel::Communicator& local) {
      parallel::FaultyCommunicator faulty(
          local, {{.kind = parallel::Fault::Kind::kDelay, .rank = 1, .seconds = delay_s}});
      parallel::CountingCommunicator world(faulty);
      parallel::DeviceMesh mesh(world, {.dp = 1, .cp = kRanks});
      Context ctx({.threads = 1});
      RunSettings settings;
      settings.run_directory = directory;
      settings.config_text = "test";
      settings.quiet = true;
      RunTraining(ctx, mesh, world, o, settings);
    });
    std::ifstream in(directory / "metrics.jsonl");
    std::vector<Json> steps;
    for (std::string line; std::getline(in, line);) {
      Json json = Json::parse(line);
      if (json.contains("loss")) steps.push_back(std::move(json));
    }
    return steps;
  }

  TemporaryFolder folder_;
};

TEST_F(ContextMetricsTest, BytesOfAStepAreThoseOfItsMicroBatchesAndRanks) {
  for (const int64_t micro_batches : {1, 3}) {
    for (const bool evaluate : {false, true}) {
      SCOPED_TRACE(Str(micro_batches, " micro-batches, evaluating ", evaluate));
      TrainOptions o = Options(micro_batches);
      o.evaluation_every_steps = evaluate ? 1 : 0;
      // Rank 1 sees the keys and values of all 128 tokens of rank 0: once in either direction, and
      // their gradients go back.
      const int64_t keys = 2 * (kLength / kRanks) * o.model.num_kv_heads * o.model.head_dim * 4;
      const int64_t attention = micro_batches * kLayers * 3 * keys;
      // 2 (P - 1) / P of them from each of 2 ranks.
      const int64_t gradients = 2 * 4 * CountParameters(o.model);
      for (const Json& step : Train(o)) {
        ASSERT_EQ(step["strategies"].size(), 1u) << step;
        EXPECT_EQ(step["strategies"]["exchange"]["bytes"], attention);
        EXPECT_EQ(step["comm_bytes"], attention + gradients);
        // A fingerprint and its complement from each rank before each micro-batch.
        EXPECT_EQ(step["control_bytes"], micro_batches * kRanks * 16);
        // 128 * 129 / 2 pairs on rank 0, the others of 256 * 257 / 2 on rank 1.
        for (const char* key : {"work_max_over_mean", "context_work_max_over_mean"}) {
          EXPECT_DOUBLE_EQ(step[key], (32896.0 - 8256) / 16448) << key;
        }
        EXPECT_GT(step["plan_ms"], 0);
      }
    }
  }
}

// A layer whose received keys take exactly the budget keeps them.
TEST_F(ContextMetricsTest, KeysWithinTheBudgetAreFetchedOnce) {
  TrainOptions o = Options(1);
  o.steps = 1;
  const int64_t keys = 2 * (kLength / kRanks) * o.model.num_kv_heads * o.model.head_dim * 4;
  for (const int64_t short_of : {0, 1}) {
    o.keep_key_bytes = keys - short_of;
    EXPECT_EQ(Train(o)[0]["strategies"]["exchange"]["bytes"], kLayers * (2 + short_of) * keys);
  }
}

// Rank 1 sleeps in the middle of attention, and rank 0 waits for it there, in every micro-batch.
TEST_F(ContextMetricsTest, ExposedTimeIsThatOfTheRankThatWaitsMost) {
  constexpr double kDelay = 0.02;
  const auto exposed_ms = [&](int64_t micro_batches) {
    double least = 1e9;
    for (const Json& step : Train(Options(micro_batches), kDelay)) {
      const double ms = step["strategies"]["exchange"]["exposed_ms"];
      EXPECT_LT(ms, step["step_ms"]);
      least = std::min(least, ms);
    }
    return least;
  };
  const double one = exposed_ms(1), three = exposed_ms(3);
  std::printf("exposed: %.1f ms, with three micro-batches %.1f ms\n", one, three);
  // Of each layer at least the delay of a fetch and that of its gradients.
  EXPECT_GT(one, 1e3 * kDelay * kLayers);
  EXPECT_GT(three, one + 2 * 1e3 * kDelay * kLayers);
}

}  // namespace
}  // namespace longspan::test
