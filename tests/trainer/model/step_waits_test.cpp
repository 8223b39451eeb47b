// What a step on a GPU must not do, seen by the emulated device: wait, allocate, read back, take
// sums that failed for a result.
#include <gtest/gtest.h>

#include <cmath>

#include "ops/core/cuda/backend.h"
#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/self.h"
#include "tests/emulated_cuda/emulator.h"
#include "tests/emulated_cuda/nccl_control.h"
#include "tests/ops/op_test.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/batch.h"
#include "trainer/trainer.h"

namespace longspan::test {
namespace {

using namespace trainer;

TrainOptions Options(const TemporaryFolder& folder, DType dtype, int64_t micro_batches,
                     bool documents) {
  TrainOptions o;
  o.model = SmallModel(dtype);
  o.steps = 20;
  o.context_length = 64;
  o.global_batch_tokens = 64 * micro_batches;
  o.train = {{(folder.path() / "train").string(), 1}};
  o.adamw.lr = 1e-2;
  // Documents change the masks, and with them the memory that a step needs.
  o.document_mask = documents;
  return o;
}

TEST(StepWaitsTest, ASteadyStepNeitherWaitsNorAllocates) {
  TemporaryFolder folder;
  WriteCorpus((folder.path() / "train").string(), 19, 100, 150, 1);
  struct Case {
    DType dtype;
    int64_t micro_batches;
    bool documents;
  };
  for (const auto& [dtype, micro_batches, documents] :
       {Case{DType::kF32, 1, true}, {DType::kBF16, 2, false}}) {
    Context ctx({.device = {DeviceKind::kCuda, 0}, .threads = 1});
    parallel::SelfCommunicator world;
    world.UseDevice(ctx.runtime());
    parallel::DeviceMesh mesh(world, {.dp = 1, .cp = 1});
    Trainer trainer(ctx, mesh, Options(folder, dtype, micro_batches, documents));
    emulated::SetLag(5);  // the host is always ahead
    PendingStep pending = trainer.BeginStep();
    for (int step = 1; step < 8; ++step) {
      const emulated::Counters before = emulated::Count();
      PendingStep next = trainer.BeginStep();
      const emulated::Counters after = emulated::Count();
      if (step >= 4) {
        EXPECT_EQ(after.host_waits, before.host_waits) << "step " << step;
        EXPECT_EQ(after.blocking_copies, before.blocking_copies) << "step " << step;
        if (!documents && kAllocatorReuses) {
          EXPECT_EQ(after.allocations, before.allocations) << "step " << step;
        }
        EXPECT_EQ(after.host_allocations, before.host_allocations) << "step " << step;
      }
      EXPECT_GT(after.launches, before.launches);
      trainer.FinishStep(std::move(pending));
      pending = std::move(next);
    }
    trainer.FinishStep(std::move(pending));
    emulated::SetLag(0);
  }
}

constexpr int kRemoteError = 6;  // as NCCL counts them

// Rank 1 never begins the second step. What rank 0 has issued then ends without any sum, and the
// device goes on to the report.
TEST(StepFailureTest, AStepWhoseSumsFailedIsNotReported) {
  TemporaryFolder folder;
  WriteCorpus((folder.path() / "train").string(), 19, 100, 150, 1);
  for (const bool counted : {false, true}) {
    parallel::RunLocal(2, [&](parallel::Communicator& control) {
      Context ctx({.device = {DeviceKind::kCuda, 0}, .threads = 1});
      const auto world =
          parallel::MakeNccl(control, ctx.runtime(), {.timeout_s = 60, .exit_after_s = 0});
      parallel::CountingCommunicator counting(*world);
      parallel::DeviceMesh mesh(counted ? counting : *world, {.dp = 2, .cp = 1});
      Trainer trainer(ctx, mesh, Options(folder, DType::kF32, 2, true));
      EXPECT_TRUE(std::isfinite(trainer.Step().loss));
      if (control.rank() == 0) {
        PendingStep pending = trainer.BeginStep();
        emulated::FailNcclRank(0, kRemoteError);
        EXPECT_THROW(trainer.FinishStep(std::move(pending)), CommError);
        emulated::FailNcclRank(-1, 0);
      }
      control.Barrier();
    });
  }
}

// The RoPE table of a long batch is larger than what a GPU has of pinned memory at first.
TEST(StepWaitsTest, LongBatchesGoUpWithoutWaiting) {
  Context host({.threads = 1}), ctx({.device = {DeviceKind::kCuda, 0}, .threads = 1});
  constexpr int64_t kTokens = 49152, kHalf = 64;
  LocalBatch batch;
  batch.ids = host.Zeros({kTokens}, DType::kI32);
  batch.labels = host.Zeros({kTokens}, DType::kI32);
  batch.order = ops::OrderTokens(host, batch.ids, 19);
  batch.rope = {FromVec(host, {kTokens, kHalf}, DType::kF32, Normal(kTokens * kHalf, 1)),
                host.Zeros({kTokens, kHalf}, DType::kF32)};
  LocalBatch former = ToDevice(ctx, batch);
  for (int step = 0; step < 4; ++step) {
    cuda::Synchronize(ctx.cuda());
    emulated::SetLag(1000);
    const emulated::Counters before = emulated::Count();
    former = ToDevice(ctx, batch);
    const LocalBatch next = ToDevice(ctx, batch);  // the host is one step ahead
    const emulated::Counters after = emulated::Count();
    emulated::SetLag(0);
    EXPECT_EQ(after.host_waits, before.host_waits) << "step " << step;
    EXPECT_EQ(after.host_allocations, before.host_allocations) << "step " << step;
    EXPECT_TRUE(SameBits(next.rope.cos, batch.rope.cos));
  }
}

}  // namespace
}  // namespace longspan::test
