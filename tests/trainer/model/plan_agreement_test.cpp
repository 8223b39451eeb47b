// Ranks that share rows and see other documents in them: a ring moves the same bytes whatever the
// documents are, so nothing but the comparison of plans can tell. On a CPU it comes before the
// micro-batch, on a GPU with the sums of the step.
#include <gtest/gtest.h>

#include <mutex>
#include <numeric>

#include "parallel/comm/local.h"
#include "tests/support/device.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/step.h"

namespace longspan::test {
namespace {

using namespace trainer;

constexpr int64_t kLength = 256;

data::Row RowWithDocument(int64_t end) {
  data::Row row;
  for (int64_t i = 0; i < kLength; ++i) {
    row.tokens.push_back(static_cast<int32_t>(i % 19));
    row.labels.push_back(static_cast<int32_t>((i + 1) % 19));
  }
  row.positions.resize(kLength);
  std::iota(row.positions.begin(), row.positions.end(), 0);
  row.doc_ends = {end, kLength};
  return row;
}

// What each rank throws for plans that differ in step `fails` (from 0), when the last rank's row of
// that step, the second micro-batch, has another document.
std::vector<std::string> ErrorsOfRun(int dp, int cp, int64_t fails) {
  TrainOptions o;
  o.model = SmallModel(DType::kF32);
  o.steps = 4;
  o.context_length = kLength;
  o.global_batch_tokens = 2 * dp * kLength;
  o.dp = dp, o.cp = cp;
  o.placement = parallel::PlacementKind::kContiguous;
  o.strategy.kind = parallel::StrategyKind::kRing;
  std::vector<std::string> errors(static_cast<size_t>(dp * cp));
  parallel::RunLocal(dp * cp, [&](parallel::Communicator& world) {
    Context ctx({.device = TestDevice(), .threads = 1});
    world.UseDevice(ctx.runtime());
    ctx.SetProgress([&] { world.Progress(); });
    parallel::DeviceMesh mesh(world, {.dp = dp, .cp = cp});
    ParameterStore store(ctx, o.model, StoreOptions{});
    store.Initialize(1);
    TrainStep steps(ctx, mesh, o, store);
    BatchBuilder builder(o.model, o.context_layout(0), mesh.cp_index());
    const bool differs = world.rank() == dp * cp - 1;
    data::LoaderOptions loading;
    loading.row = [&](int64_t n) {
      return RowWithDocument(differs && n == 2 * fails + 1 ? 100 : 101);
    };
    loading.sample_indices = [](int64_t n) { return std::vector<int64_t>{n}; };
    loading.attach = [&](const data::MicroBatch& b) -> std::shared_ptr<void> {
      return builder.Build(b);
    };
    data::Loader loader(std::move(loading));
    for (int64_t step = 0; step <= fails; ++step) {
      try {
        steps.Finish(steps.Begin(loader, step, nullptr));
        EXPECT_LT(step, fails) << "rank " << world.rank() << " noticed nothing";
      } catch (const CommError& e) {
        EXPECT_EQ(step, fails) << e.what();
        errors[static_cast<size_t>(world.rank())] = e.what();
        break;
      }
    }
  });
  return errors;
}

TEST(PlanAgreementTest, EveryRankNamesTheOneThatDiffers) {
  for (const int64_t fails : {0, 1}) {
    for (const std::string& error : ErrorsOfRun(1, 2, fails)) {
      EXPECT_NE(error.find("rank 1 of 2 differs"), std::string::npos) << error;
    }
    const std::vector<std::string> errors = ErrorsOfRun(2, 2, fails);
    for (const size_t rank : {0, 1, 2, 3}) {
      // Compared before the micro-batch, plans are those of the ranks that share its row: the
      // others see that these two have gone.
      if (rank < 2 && (!OnCuda() || fails == 0)) continue;
      EXPECT_NE(errors[rank].find("rank 3 of 4 differs"), std::string::npos) << errors[rank];
    }
  }
}

}  // namespace
}  // namespace longspan::test
