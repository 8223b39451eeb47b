// What the forecast says of a step's memory, against the allocator.
#include "trainer/model/memory.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <functional>

#include "ops/loss/linear_cross_entropy.h"
#include "parallel/comm/self.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/batch.h"
#include "trainer/model/decoder.h"

namespace longspan::test {
namespace {

using namespace trainer;

struct Measured {
  size_t peak = 0, largest = 0;
  BytesByCategory by_category{};
};

// Forward and backward pass of one row that is one document.
Measured Measure(const ModelOptions& model, int64_t tokens) {
  Context ctx(ContextOptions{.threads = 1, .poison_buffers = false});
  parallel::SelfCommunicator self;
  ParameterStore store(ctx, model, /*training=*/true);
  store.Initialize(3);
  store.ZeroGrads();
  data::MicroBatch batch;
  batch.rows = 1;
  batch.row_length = tokens;
  for (int64_t i = 0; i < tokens; ++i) {
    batch.tokens.push_back(static_cast<int32_t>(i * 7 % model.vocab_size));
    batch.labels.push_back(static_cast<int32_t>((i + 1) * 7 % model.vocab_size));
    batch.positions.push_back(i);
  }
  batch.doc_ends = {{tokens}};
  BatchBuilder builder(model,
                       parallel::Placement(parallel::PlacementKind::kContiguous, 1, tokens, 1),
                       parallel::StrategyKind::kRing, 0);
  const auto prepared = builder.Build(batch);
  autograd::Tape tape(ctx);
  DecoderForward(tape, self, model, store, prepared->local, {});
  tape.Backward();
  return {ctx.allocator().peak_bytes(), ctx.allocator().largest_bytes(),
          ctx.allocator().peak_by_category()};
}

ModelOptions Model(DType dtype) {
  ModelOptions m = SmallModel(dtype);
  m.vocab_size = 500;
  m.hidden_size = 64;
  m.num_heads = 4;
  m.num_kv_heads = 4;
  m.head_dim = 16;
  m.ffn_hidden_size = 176;
  m.mixers = {{"causal", ops::AttentionPattern::Causal()}};
  m.layers = {0, 0, 0};
  return m;
}

size_t Of(const MemoryForecast& forecast, MemoryCategory category) {
  return forecast.by_category[static_cast<size_t>(category)];
}

TEST(MemoryTest, ForecastIsNearTheAllocator) {
  struct Case {
    const char* name;
    std::function<void(ModelOptions&)> change;
  };
  const std::vector<Case> cases = {
      {"plain", [](ModelOptions&) {}},
      {"one layer", [](ModelOptions& m) { m.layers = {0}; }},
      {"many layers", [](ModelOptions& m) { m.layers.assign(9, 0); }},
      {"recompute", [](ModelOptions& m) { m.recompute_layers = true; }},
      {"attention kept", [](ModelOptions& m) { m.recompute_layers = m.keep_attention = true; }},
      {"attention kept, tiles",
       [](ModelOptions& m) {
         m.recompute_layers = m.keep_attention = true;
         m.mlp_tile_tokens = 256;
       }},
      {"recompute, tiles",
       [](ModelOptions& m) {
         m.recompute_layers = true;
         m.mlp_tile_tokens = 200;
       }},
      {"tiles alone", [](ModelOptions& m) { m.mlp_tile_tokens = 256; }},
      {"gqa", [](ModelOptions& m) { m.num_kv_heads = 1; }},
      {"narrow mlp", [](ModelOptions& m) { m.ffn_hidden_size = 16; }},
      {"gelu", [](ModelOptions& m) { m.mlp = MlpKind::kGelu; }},
      {"tied", [](ModelOptions& m) { m.tie_embeddings = true; }},
      {"large vocabulary", [](ModelOptions& m) { m.vocab_size = 9000; }},
      {"s2",
       [](ModelOptions& m) {
         m.mixers[0].pattern = ops::AttentionPattern::S2({.local_blocks = 1, .stride_blocks = 2});
       }},
      {"sigmoid",
       [](ModelOptions& m) { m.mixers[0].normalization = ops::Normalization::kSigmoid; }},
      {"wide residual",
       [](ModelOptions& m) {
         if (m.compute == DType::kBF16) m.residual = DType::kF32;
       }},
  };
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const Case& c : cases) {
      SCOPED_TRACE(Str(c.name, " ", ToString(dtype)));
      ModelOptions model = Model(dtype);
      c.change(model);
      constexpr int64_t kTokens = 1500;
      const auto forecast = ForecastStepMemory(model, kTokens, DeviceKind::kCpu);
      ASSERT_TRUE(forecast.has_value());
      const Measured measured = Measure(model, kTokens);
      const double ratio =
          static_cast<double>(measured.peak) / static_cast<double>(forecast->bytes);
      EXPECT_GT(ratio, 0.95);
      EXPECT_LT(ratio, 1.10);
      const auto attention = static_cast<size_t>(MemoryCategory::kAttention);
      EXPECT_EQ(measured.by_category[attention], forecast->by_category[attention]);
      std::printf("%-22s %s %.3f\n", c.name, ToString(dtype), ratio);
    }
  }
}

TEST(MemoryTest, CategoriesAreThoseOfTheStore) {
  const ModelOptions model = Model(DType::kBF16);
  const auto forecast = ForecastStepMemory(model, 1000, DeviceKind::kCpu);
  Context ctx(ContextOptions{.threads = 1});
  const ParameterStore store(ctx, model, /*training=*/true);
  const BytesByCategory held = ctx.allocator().peak_by_category();
  for (const MemoryCategory c :
       {MemoryCategory::kParameters, MemoryCategory::kGradients, MemoryCategory::kOptimizer}) {
    EXPECT_EQ(Of(*forecast, c), held[static_cast<size_t>(c)]) << ToString(c);
  }
  size_t sum = 0;
  for (const size_t bytes : forecast->by_category) sum += bytes;
  EXPECT_EQ(sum, forecast->bytes);
  ModelOptions gates = model;
  gates.gates_only = true;
  EXPECT_FALSE(ForecastStepMemory(gates, 1000, DeviceKind::kCpu).has_value());
}

// Sigmoid keeps no log-sum-exp: what the forecast leaves out for it the step does not hold either.
TEST(MemoryTest, SigmoidKeepsOneRowOfNumbersLessPerLayer) {
  ModelOptions softmax = Model(DType::kF32), sigmoid = softmax;
  for (ModelOptions* m : {&softmax, &sigmoid}) {
    m->num_heads = m->num_kv_heads = 32;  // small heads, so that lse is a good part
    m->head_dim = 2;
  }
  sigmoid.mixers[0].normalization = ops::Normalization::kSigmoid;
  constexpr int64_t kTokens = 1500;
  const auto activations = [](const ModelOptions& m) {
    const auto forecast = ForecastStepMemory(m, kTokens, DeviceKind::kCpu);
    return Of(*forecast, MemoryCategory::kActivations) + Of(*forecast, MemoryCategory::kAttention);
  };
  const size_t lse = static_cast<size_t>(kTokens * softmax.num_heads) * sizeof(float);
  const size_t saved = activations(softmax) - activations(sigmoid);
  EXPECT_GE(saved, softmax.layers.size() * lse);
  EXPECT_LT(saved, (softmax.layers.size() + 1) * lse + 4096);
  const double ratio =
      static_cast<double>(Measure(sigmoid, kTokens).peak) /
      static_cast<double>(ForecastStepMemory(sigmoid, kTokens, DeviceKind::kCpu)->bytes);
  EXPECT_GT(ratio, 0.95);
  EXPECT_LT(ratio, 1.10);
}

// With tiles nothing of an MLP grows with the tokens: a rank's tokens are limited by the residual
// stream and what attention needs, whatever the width of the MLP.
TEST(MemoryTest, TiledMlpsNeedNoMoreForMoreTokens) {
  ModelOptions model = Model(DType::kBF16);
  model.mixers = {{"window", ops::AttentionPattern::Window(64)}};
  model.layers = {0, 0};
  model.ffn_hidden_size = 1024;
  model.vocab_size = 60;  // so that logits are not the largest tensor
  model.recompute_layers = true;
  constexpr int64_t kTile = 256, kTokens = 4096;
  std::printf(
      "policy          MLP in tiles  at 2048  at 4096 tokens, MiB of activations and attention "
      "(predicted)\n");
  for (const bool keep : {false, true}) {
    double at[2][2];  // [tiled][more tokens]
    for (const bool tiled : {false, true}) {
      model.keep_attention = keep;
      model.mlp_tile_tokens = tiled ? kTile : kTokens;
      double predicted[2];
      for (const int64_t tokens : {kTokens / 2, kTokens}) {
        const Measured measured = Measure(model, tokens);
        const auto forecast = ForecastStepMemory(model, tokens, DeviceKind::kCpu);
        const auto of_step = [](const BytesByCategory& bytes) {
          return static_cast<double>(bytes[static_cast<size_t>(MemoryCategory::kActivations)] +
                                     bytes[static_cast<size_t>(MemoryCategory::kAttention)]) /
                 (1 << 20);
        };
        at[tiled][tokens == kTokens] = of_step(measured.by_category);
        predicted[tokens == kTokens] = of_step(forecast->by_category);
        const double ratio =
            static_cast<double>(measured.peak) / static_cast<double>(forecast->bytes);
        EXPECT_GT(ratio, 0.95);
        EXPECT_LT(ratio, 1.10);
        const size_t inner = static_cast<size_t>(tokens * model.ffn_hidden_size) * 2;
        if (tiled) {
          EXPECT_LT(measured.largest, inner) << "something has the size of [T, ffn]";
        } else {
          EXPECT_GE(measured.largest, inner);
        }
      }
      std::printf("%-14s  %-12s  %.1f (%.1f)  %.1f (%.1f)\n", keep ? "ATTENTION_KEPT" : "LAYER",
                  tiled ? "yes" : "no", at[tiled][0], predicted[0], at[tiled][1], predicted[1]);
    }
    // A token more costs the same as it would beside an MLP of no width; whole MLPs cost several
    // times as much.
    const double token = (at[1][1] - at[1][0]) / (at[0][1] - at[0][0]);
    EXPECT_LT(token, 0.4);
    ModelOptions narrow = model;
    narrow.ffn_hidden_size = 16;
    narrow.mlp_tile_tokens = kTile;
    const auto growth = [](const ModelOptions& m) {
      const auto bytes = [&](int64_t tokens) {
        return ForecastStepMemory(m, tokens, DeviceKind::kCpu)->bytes;
      };
      return static_cast<double>(bytes(4 * kTokens) - bytes(2 * kTokens));
    };
    ModelOptions wide = model;
    wide.mlp_tile_tokens = kTile;
    EXPECT_NEAR(growth(wide) / growth(narrow), 1, 0.02);
  }
}

// The loss works on tiles of a bounded number of logits, whatever the tokens and the vocabulary.
TEST(MemoryTest, TheLossNeedsNoMoreForMoreTokens) {
  for (const int64_t vocab : {320, 5000, 50000}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const auto bytes = [&](int64_t tokens) {
        const ops::LinearCrossEntropyScratch s =
            ops::BackwardScratch(tokens, 64, vocab, dtype, DeviceKind::kCpu);
        return 4 * (s.logits + s.sums) + static_cast<int64_t>(SizeOf(dtype)) * s.gradients;
      };
      EXPECT_LT(bytes(int64_t{1} << 20), int64_t{64} << 20) << vocab;
      EXPECT_LT(static_cast<double>(bytes(int64_t{1} << 24)),
                1.05 * static_cast<double>(bytes(int64_t{1} << 20)))
          << vocab;
      EXPECT_LE(ops::AutoChunkTokens(vocab, DeviceKind::kCpu) * vocab * 4,
                std::max(int64_t{32} << 20, 64 * vocab * 4));
    }
  }
}

// Activations grow with the tokens; no tensor with their square.
TEST(MemoryTest, NothingGrowsWithTheSquareOfTheTokensOrTheirLogits) {
  ModelOptions model = Model(DType::kBF16);
  model.num_heads = model.num_kv_heads = 1;
  model.layers = {0};
  model.vocab_size = 8192;
  model.recompute_layers = true;
  constexpr int64_t kTokens = 16384;  // its square is more than the score gradients kept at a time
  EXPECT_LT(Measure(model, kTokens).largest, static_cast<size_t>(kTokens * kTokens));
}

}  // namespace
}  // namespace longspan::test
