// What the backward pass computes again: the same bits whatever is kept, attention and its
// communication once where it is kept, and MLPs in tiles.
#include <gtest/gtest.h>

#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/context/autograd.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/duo_support.h"
#include "trainer/batch.h"

namespace longspan::test {
namespace {

using namespace trainer;
using parallel::StrategyKind;

constexpr int64_t kLength = 512;

// Two rows: documents of 70, 1, 229 and 212 tokens, and one document.
data::MicroBatch MakeBatch(const ModelOptions& m) {
  data::MicroBatch batch{.rows = 2, .row_length = kLength};
  batch.doc_ends = {{70, 71, 300, kLength}, {kLength}};
  const Philox rng(5, StreamOf("recompute batch"));
  const auto vocab = static_cast<uint64_t>(m.vocab_size);
  for (const std::vector<int64_t>& ends : batch.doc_ends) {
    int64_t begin = 0;
    for (const int64_t end : ends) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t n = batch.tokens.size();
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

// What is kept of a layer, and tiles of the MLP.
struct Policy {
  const char* name;
  bool recompute, keep_attention;
  int64_t tile = 0;
};
constexpr Policy kNone = {"NONE", false, false}, kLayer = {"LAYER", true, false},
                 kAttentionKept = {"ATTENTION_KEPT", true, true};

struct Outcome {
  double loss = 0;
  std::vector<Vec> gradients;   // of each bucket, summed over ranks
  int64_t attention_calls = 0;  // of one rank, forward and backward
  std::vector<int64_t> sent;    // bytes of each rank
};

int64_t CountOf(const std::string& text, const std::string& part) {
  int64_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

Outcome RunModel(ModelOptions m, const Policy& policy, const ObjectiveOptions& objective = {},
                 ContextLayout layout = {}) {
  m.recompute_layers = policy.recompute;
  m.keep_attention = policy.keep_attention;
  m.mlp_tile_tokens = policy.tile;
  layout.rows = 2;
  layout.row_length = kLength;
  const auto ranks = static_cast<int>(layout.ranks);
  Outcome total;
  total.sent.resize(static_cast<size_t>(ranks));
  std::vector<double> losses(total.sent.size());
  std::vector<std::vector<Vec>> gradients(total.sent.size());
  parallel::RunLocal(ranks, [&](parallel::Communicator& local) {
    parallel::CountingCommunicator comm(local);
    Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
    const auto recorder = std::make_shared<TraceRecorder>(0);
    ctx.trace().Record(recorder, "compute");
    ParameterStore store(ctx, m, true);
    store.Initialize(11);
    for (Bucket& b : store.buckets()) {  // gates that mix
      for (size_t i = 0; i < b.specs.size(); ++i) {
        if (!b.specs[i].fraction) continue;
        for (const int64_t h : {0, 1}) {
          b.master.Rows(b.offsets[i] + h, b.offsets[i] + h + 1)
              .WriteFrom(FromVec(ctx, {1}, b.master.dtype(), {h == 0 ? 0.25 : 0.75}).raw());
        }
      }
    }
    BatchBuilder builder(m, layout, comm.rank());
    const auto batch = builder.Build(MakeBatch(m));
    autograd::Tape tape(ctx);
    const Tensor sums = ObjectiveForward(tape, comm, objective, m, store, batch->local, {});
    tape.Backward();
    const auto rank = static_cast<size_t>(comm.rank());
    losses[rank] = ToVec(sums)[ops::kLossSum];
    total.sent[rank] = comm.counts().Total().bytes;
    if (rank == 0) total.attention_calls = CountOf(recorder->Events(), "\"name\":\"attention\"");
    for (const Bucket& b : store.buckets()) gradients[rank].push_back(ToVec(b.grad));
    ctx.trace().Record(nullptr, "");
  });
  total.gradients = gradients[0];  // then in the order of the ranks, so that bits can be compared
  for (size_t rank = 0; rank < losses.size(); ++rank) {
    total.loss += losses[rank];
    for (size_t b = 0; rank > 0 && b < total.gradients.size(); ++b) {
      for (size_t i = 0; i < total.gradients[b].size(); ++i) {
        total.gradients[b][i] += gradients[rank][b][i];
      }
    }
  }
  return total;
}

struct Kind {
  const char* name;
  ModelOptions model;
  ObjectiveOptions objective{};
  bool several_ranks = true;
};

// One of every kind of mixer, three layers each where one of them is dense.
std::vector<Kind> Kinds(DType dtype) {
  const ModelOptions small = SmallModel(dtype);
  ModelOptions sigmoid = small;
  sigmoid.mixers[0].normalization = ops::Normalization::kSigmoid;
  ModelOptions seer = small;
  seer.mixers[0].seer = SeerOptions{.block_size = 64, .gate_dim = 6, .selection = {.top_k = 2}};
  seer.layers = {0, 1, 0};
  ModelOptions moba = small;
  moba.mixers[0].moba = {.block_size = 64, .top_k = 3};
  ModelOptions frozen = GatedModel(dtype, 5, 70);
  frozen.layers = {1, 0, 1};  // below the gate nothing is differentiated
  return {{"softmax", small},
          {"sigmoid", sigmoid},
          {"duo", GatedModel(dtype, 5, 70), DuoObjective(0.3)},
          {"duo above a frozen layer", frozen, DuoObjective(0.3)},
          {"seer", seer, {}, false},
          {"moba", moba, {}, false}};
}

void ExpectSame(const Outcome& got, const Outcome& expected) {
  EXPECT_EQ(got.loss, expected.loss);
  ASSERT_EQ(got.gradients.size(), expected.gradients.size());
  for (size_t b = 0; b < got.gradients.size(); ++b) {
    EXPECT_EQ(got.gradients[b], expected.gradients[b]) << "bucket " << b;
  }
}

TEST(RecomputeModelTest, EveryPolicyGivesTheSameBitsWithEveryMixer) {
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    for (const Kind& kind : Kinds(dtype)) {
      SCOPED_TRACE(Str(kind.name, " ", ToString(dtype)));
      const Outcome none = RunModel(kind.model, kNone, kind.objective);
      EXPECT_GT(std::abs(none.loss), 0.1);
      const Outcome layer = RunModel(kind.model, kLayer, kind.objective);
      const Outcome kept = RunModel(kind.model, kAttentionKept, kind.objective);
      ExpectSame(layer, none);
      ExpectSame(kept, none);
      EXPECT_EQ(kept.attention_calls, none.attention_calls) << "attention runs again";
      EXPECT_GT(layer.attention_calls, none.attention_calls);
    }
  }
}

// With every strategy, what it needs for its backward pass included.
std::vector<ContextLayout> Layouts(int64_t ranks) {
  std::vector<ContextLayout> all;
  for (const StrategyKind kind : {StrategyKind::kRing, StrategyKind::kAllGather,
                                  StrategyKind::kUlysses, StrategyKind::kExchange}) {
    all.push_back({.ranks = ranks, .strategy = {.kind = kind}});
  }
  all.push_back({.ranks = ranks,
                 .strategy = {.kind = StrategyKind::kExchange},
                 .keep_key_bytes = int64_t{1} << 30});
  if (ranks == 4) {
    all.push_back(
        {.ranks = ranks, .strategy = {.kind = StrategyKind::kDoubleRing, .ranks_per_node = 2}});
    all.push_back(
        {.ranks = ranks, .strategy = {.kind = StrategyKind::kHybrid, .ulysses_ranks = 2}});
  }
  return all;
}

TEST(RecomputeModelTest, KeptAttentionSendsNothingAgain) {
  for (const Kind& kind : Kinds(DType::kF64)) {
    if (!kind.several_ranks) continue;
    for (const int64_t ranks : {2, 4}) {
      for (const ContextLayout& layout : Layouts(ranks)) {
        SCOPED_TRACE(Str(kind.name, " ", ranks, " ranks ", ToString(layout.strategy.kind),
                         layout.keep_key_bytes > 0 ? " keeping" : ""));
        const auto run = [&](const Policy& policy) {
          return RunModel(kind.model, policy, kind.objective, layout);
        };
        const Outcome none = run(kNone), layer = run(kLayer), kept = run(kAttentionKept);
        ExpectSame(layer, none);
        ExpectSame(kept, none);
        EXPECT_EQ(kept.attention_calls, none.attention_calls);
        for (size_t rank = 0; rank < none.sent.size(); ++rank) {
          EXPECT_EQ(kept.sent[rank], none.sent[rank]);
          EXPECT_GT(layer.sent[rank], none.sent[rank]);
        }
      }
    }
  }
}

// Memory is reported for what it is: the forward pass of attention alone, on two ranks. What of it
// is attention's own is compared with the forecast in memory_test.
TEST(RecomputeModelTest, TransfersOfAttentionHaveACategory) {
  for (const StrategyKind kind : {StrategyKind::kRing, StrategyKind::kAllGather,
                                  StrategyKind::kUlysses, StrategyKind::kExchange}) {
    SCOPED_TRACE(ToString(kind));
    parallel::RunLocal(2, [&](parallel::Communicator& comm) {
      Context ctx(ContextOptions{.threads = 1});
      const ModelOptions m = SmallModel(DType::kF32);
      BatchBuilder builder(m, parallel::Placement(parallel::PlacementKind::kZigzag, 2, kLength, 2),
                           kind, comm.rank());
      const auto batch = builder.Build(MakeBatch(m));
      const auto heads = [&](int64_t n, uint64_t seed) {
        return autograd::Var(FromVec(ctx, {kLength, n, m.head_dim}, DType::kF32,
                                     Normal(kLength * n * m.head_dim, seed)),
                             /*requires_grad=*/true);
      };
      autograd::Tape tape(ctx);
      const autograd::Var q = heads(m.num_heads, 1), k = heads(m.num_kv_heads, 2),
                          v = heads(m.num_kv_heads, 3);
      const size_t before = ctx.allocator().used_bytes();
      parallel::ContextAttention(tape, comm, batch->local.plans[0], q, k, v);
      const BytesByCategory peak = ctx.allocator().peak_by_category();
      const auto of = [&](MemoryCategory c) { return peak[static_cast<size_t>(c)]; };
      EXPECT_EQ(of(MemoryCategory::kActivations), before) << "operands, and nothing beside them";
      // At least half of the other rank's keys and values.
      EXPECT_GE(of(MemoryCategory::kCommunication), k.value().bytes());
    });
  }
}

TEST(RecomputeModelTest, TiledMlpsAreThoseAtOnce) {
  std::vector<Kind> kinds = Kinds(DType::kF64);
  kinds.push_back({"gelu", kinds[0].model});
  kinds.back().model.mlp = MlpKind::kGelu;
  for (const Kind& kind : kinds) {
    for (Policy policy : {kNone, kLayer, kAttentionKept}) {
      const Outcome whole = RunModel(kind.model, policy, kind.objective);
      for (const int64_t tile : {100, 1024}) {
        SCOPED_TRACE(Str(kind.name, " ", policy.name, " in tiles of ", tile));
        policy.tile = tile;
        const Outcome tiled = RunModel(kind.model, policy, kind.objective);
        EXPECT_NEAR(tiled.loss, whole.loss, 1e-12 * std::abs(whole.loss));
        for (size_t b = 0; b < whole.gradients.size(); ++b) {
          EXPECT_LT(RelMax(tiled.gradients[b], whole.gradients[b]), 1e-12) << "bucket " << b;
        }
        if (tile >= 1024) ExpectSame(tiled, whole);  // all tokens at once
        EXPECT_EQ(tiled.attention_calls, whole.attention_calls);
      }
    }
  }
}

TEST(RecomputeModelTest, TilesInLowPrecisionAndOnSeveralRanks) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const ModelOptions m = SmallModel(dtype);
    const Outcome exact = RunModel(SmallModel(DType::kF64), kNone);
    const Outcome whole = RunModel(m, kNone);
    const Outcome tiled = RunModel(m, {"tiles", true, true, 100}, {}, {.ranks = 2});
    for (size_t b = 0; b < whole.gradients.size(); ++b) {
      const double rounding = RelRms(whole.gradients[b], exact.gradients[b]);
      EXPECT_LT(RelRms(tiled.gradients[b], exact.gradients[b]), 2 * rounding + 1e-7) << b;
    }
  }
}

// Automatic tiles, where layers are recomputed anyway.
TEST(RecomputeModelTest, WhichTilesAreChosen) {
  ModelOptions m;
  EXPECT_EQ(m.MlpTile(1 << 20), 1 << 20);
  m.recompute_layers = true;
  EXPECT_EQ(m.MlpTile(1 << 20), kMlpTileTokens);
  m.mlp_tile_tokens = 100;
  EXPECT_EQ(m.MlpTile(1 << 20), 100);
  m.recompute_layers = false;
  EXPECT_EQ(m.MlpTile(1 << 20), 100);
}

}  // namespace
}  // namespace longspan::test
