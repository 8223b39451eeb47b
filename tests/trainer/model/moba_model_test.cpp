// Models with routed layers: where every block is chosen they are the causal model, in losses and
// in gradients of all weights, and rows may be split over ranks.
#include <gtest/gtest.h>

#include <mutex>

#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/batch.h"
#include "trainer/model/decoder.h"

namespace longspan::test {
namespace {

using namespace trainer;

constexpr int64_t kLength = 330, kRows = 2;

// One row of several documents and one that is a document.
data::MicroBatch MakeBatch(const ModelOptions& m) {
  data::MicroBatch batch{.rows = kRows, .row_length = kLength};
  batch.doc_ends = {{70, 71, 230, kLength}, {kLength}};
  const Philox rng(3, StreamOf("moba batch"));
  for (const std::vector<int64_t>& ends : batch.doc_ends) {
    int64_t begin = 0;
    for (const int64_t end : ends) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t n = batch.tokens.size(), vocab = static_cast<uint64_t>(m.vocab_size);
        batch.tokens.push_back(static_cast<int32_t>(rng.Below(2 * n, vocab)));
        batch.labels.push_back(i + 1 == end ? -1
                                            : static_cast<int32_t>(rng.Below(2 * n + 1, vocab)));
        batch.positions.push_back(i - begin);
      }
      begin = end;
    }
  }
  return batch;
}

struct Outcome {
  double loss = 0, attention_pairs = 0;
  Vec gradients;  // of all weights
};
Outcome RunModel(const ModelOptions& m) {
  const data::MicroBatch micro_batch = MakeBatch(m);
  Context ctx(ContextOptions{.threads = 2, .poison_buffers = true});
  parallel::SelfCommunicator comm;
  ParameterStore store(ctx, m, true);
  store.Initialize(11);
  BatchBuilder builder(m, parallel::Placement(parallel::PlacementKind::kZigzag, kRows, kLength, 1),
                       parallel::StrategyKind::kRing, 0);
  const auto batch = builder.Build(micro_batch);
  autograd::Tape tape(ctx);
  const auto loss = DecoderForward(tape, comm, m, store, batch->local, {});
  tape.Backward();
  Outcome out{.loss = ops::ReadLossSums(loss.sums).loss, .attention_pairs = batch->attention_pairs};
  for (Bucket& bucket : store.buckets()) {
    const Vec g = ToVec(bucket.grad);
    out.gradients.insert(out.gradients.end(), g.begin(), g.end());
  }
  return out;
}

ModelOptions CausalModel(DType dtype) {
  ModelOptions m = SmallModel(dtype);
  m.mixers = {{"dense", ops::AttentionPattern::Causal()},
              {"other", ops::AttentionPattern::Causal()}};
  return m;
}
ModelOptions MobaModel(DType dtype, int64_t top_k) {
  ModelOptions m = CausalModel(dtype);
  m.mixers[1].moba = {.block_size = 64, .top_k = top_k};
  return m;
}

TEST(MobaModelTest, ChoosingEveryBlockIsTheCausalModel) {
  const Outcome causal = RunModel(CausalModel(DType::kF64));
  for (const int64_t top_k : {6, 1000}) {  // 330 tokens are 6 blocks
    const Outcome moba = RunModel(MobaModel(DType::kF64, top_k));
    EXPECT_NEAR(moba.loss / causal.loss, 1, 1e-13) << top_k;
    EXPECT_LT(RelMax(moba.gradients, causal.gradients), 1e-12) << top_k;
    EXPECT_EQ(moba.attention_pairs, causal.attention_pairs);
  }
  const Outcome f32 = RunModel(MobaModel(DType::kF32, 6));
  EXPECT_NEAR(f32.loss / causal.loss, 1, 1e-5);
  EXPECT_LT(RelRms(f32.gradients, causal.gradients), 1e-4);
  const Outcome bf16 = RunModel(MobaModel(DType::kBF16, 6));
  EXPECT_NEAR(bf16.loss / causal.loss, 1, 1e-2);
}

TEST(MobaModelTest, FewerBlocksChangeTheModel) {
  const Outcome causal = RunModel(CausalModel(DType::kF64));
  const Outcome two = RunModel(MobaModel(DType::kF64, 2)),
                one = RunModel(MobaModel(DType::kF64, 1));
  EXPECT_GT(std::abs(two.loss / causal.loss - 1), 1e-5);
  EXPECT_GT(std::abs(one.loss / two.loss - 1), 1e-5);
  EXPECT_LT(two.attention_pairs, causal.attention_pairs);
  EXPECT_LT(one.attention_pairs, two.attention_pairs);
}

// The second pass of a recomputed layer chooses the same blocks.
TEST(MobaModelTest, RecomputeChangesNothing) {
  for (const DType dtype : {DType::kF64, DType::kBF16}) {
    ModelOptions m = MobaModel(dtype, 3);
    const Outcome kept = RunModel(m);
    m.recompute_layers = true;
    const Outcome again = RunModel(m);
    EXPECT_EQ(again.loss, kept.loss);
    EXPECT_EQ(again.gradients, kept.gradients);
  }
}

// The loss and the gradients of all ranks together, and control bytes that one of them sent.
struct SplitOutcome {
  double loss = 0, attention_pairs = 0;
  Vec gradients;
  int64_t control_bytes = 0;
};
SplitOutcome RunSplit(const ModelOptions& m, const data::MicroBatch& micro_batch, int ranks,
                      parallel::PlacementKind placement) {
  SplitOutcome all;
  std::mutex mutex;
  parallel::RunLocal(ranks, [&](parallel::Communicator& world) {
    parallel::CountingCommunicator comm(world);
    Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
    ctx.SetProgress([&] { comm.Progress(); });
    ParameterStore store(ctx, m, true);
    store.Initialize(11);
    BatchBuilder builder(m,
                         {.placement = placement,
                          .rows = micro_batch.rows,
                          .row_length = micro_batch.row_length,
                          .ranks = ranks,
                          .strategy = {.kind = parallel::StrategyKind::kRing}},
                         comm.rank());
    const auto batch = builder.Build(micro_batch);
    autograd::Tape tape(ctx);
    const auto loss = DecoderForward(tape, comm, m, store, batch->local, {});
    tape.Backward();
    const std::lock_guard lock(mutex);
    all.loss += ops::ReadLossSums(loss.sums).loss;
    all.attention_pairs += batch->attention_pairs;
    all.control_bytes = std::max(all.control_bytes, comm.counts().control.bytes);
    size_t at = 0;
    for (Bucket& bucket : store.buckets()) {
      for (const double g : ToVec(bucket.grad)) {
        if (at == all.gradients.size()) all.gradients.push_back(0);
        all.gradients[at++] += g;
      }
    }
  });
  return all;
}

TEST(MobaModelTest, RanksThatShareRowsAreOneRank) {
  constexpr int64_t kLong = 512;
  for (const int64_t top_k : {1, 3}) {
    for (const bool recompute : {false, true}) {
      ModelOptions m = MobaModel(DType::kF64, top_k);
      m.recompute_layers = recompute;
      data::MicroBatch batch{.rows = 1, .row_length = kLong};
      batch.doc_ends = {{130, 131, kLong}};
      const Philox rng(5, StreamOf("moba ranks"));
      for (int64_t i = 0; i < kLong; ++i) {
        const uint64_t n = static_cast<uint64_t>(i), vocab = static_cast<uint64_t>(m.vocab_size);
        batch.tokens.push_back(static_cast<int32_t>(rng.Below(2 * n, vocab)));
        const bool last = i == 129 || i == 130 || i == kLong - 1;
        batch.labels.push_back(last ? -1 : static_cast<int32_t>(rng.Below(2 * n + 1, vocab)));
        batch.positions.push_back(i < 130 ? i : i == 130 ? 0 : i - 131);
      }
      const SplitOutcome one = RunSplit(m, batch, 1, parallel::PlacementKind::kContiguous);
      EXPECT_EQ(one.control_bytes, 0);
      for (const auto& [ranks, placement] : {std::pair{2, parallel::PlacementKind::kZigzag},
                                             {2, parallel::PlacementKind::kStriped},
                                             {4, parallel::PlacementKind::kBalanced}}) {
        SCOPED_TRACE(Str(ranks, " ranks ", ToString(placement), " top ", top_k, recompute));
        const SplitOutcome got = RunSplit(m, batch, ranks, placement);
        EXPECT_NEAR(got.loss / one.loss, 1, 1e-12);
        EXPECT_LT(RelMax(got.gradients, one.gradients), 1e-10);
        EXPECT_EQ(got.attention_pairs, one.attention_pairs);
        EXPECT_EQ(got.control_bytes > 0, top_k > 1);
      }
    }
  }
}

}  // namespace
}  // namespace longspan::test
