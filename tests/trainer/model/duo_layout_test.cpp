// Gate training in every layout, and what it finds out about a model whose needs are known.
#include <gtest/gtest.h>

#include <cmath>
#include <mutex>
#include <numeric>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/duo_support.h"
#include "trainer/trainer.h"

namespace longspan::test {
namespace {

using namespace trainer;
using parallel::PlacementKind;
using parallel::StrategyKind;

struct GateRun {
  Vec losses, norms, means, gates;
};

Vec GatesOf(Trainer& trainer) {
  Vec gates;
  for (const NamedTensor& t : trainer.State()) {
    if (!t.name.starts_with("weights/") || !IsGateName(t.name)) continue;
    const Vec values = ToVec(t.tensor);
    gates.insert(gates.end(), values.begin(), values.end());
  }
  return gates;
}

GateRun Train(TrainOptions o, int dp, int cp) {
  o.dp = dp;
  o.cp = cp;
  GateRun result;
  std::mutex mutex;
  parallel::RunLocal(dp * cp, [&](parallel::Communicator& world) {
    parallel::DeviceMesh mesh(world, {.dp = dp, .cp = cp});
    Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
    ctx.SetProgress([&] { mesh.axis("cp").Progress(); });
    Trainer trainer(ctx, mesh, o);
    GateRun mine;
    while (trainer.step() < o.steps) {
      const StepResult step = trainer.Step();
      mine.losses.push_back(step.loss);
      mine.norms.push_back(step.grad_norm);
      mine.means.push_back(*step.mean_gate);
    }
    mine.gates = GatesOf(trainer);
    std::lock_guard lock(mutex);
    if (result.losses.empty()) {
      result = mine;
    } else {  // every rank leaves with the same bits
      EXPECT_EQ(result.losses, mine.losses);
      EXPECT_EQ(result.gates, mine.gates);
    }
  });
  return result;
}

void ExpectEqual(const GateRun& got, const GateRun& expected, double tolerance) {
  EXPECT_LT(RelMax(got.losses, expected.losses), tolerance);
  EXPECT_LT(RelMax(got.norms, expected.norms), tolerance);
  EXPECT_LT(RelMax(got.means, expected.means), tolerance);
  EXPECT_LT(RelMax(got.gates, expected.gates), tolerance);
}

TrainOptions LayoutOptions(const TemporaryFolder& folder, DType dtype) {
  TrainOptions o;
  o.model = GatedModel(dtype, 5, 70);
  o.objective = DuoObjective(0.05);
  o.steps = 4;
  o.context_length = 512;
  o.global_batch_tokens = 4 * 512;
  o.train = {{(folder.path() / "train").string(), 1}};
  o.adamw.lr = 0.05;
  return o;
}

TEST(DuoLayoutTest, EveryLayoutTrainsTheSameGates) {
  TemporaryFolder folder;
  WriteCorpus((folder.path() / "train").string(), 19, 200, 300, 1);
  TrainOptions o = LayoutOptions(folder, DType::kF64);
  const GateRun one = Train(o, 1, 1);
  EXPECT_LT(one.means.back(), one.means.front());
  ExpectEqual(Train(o, 2, 1), one, 1e-9);
  ExpectEqual(Train(o, 2, 2), one, 1e-9);
  for (const auto placement : {PlacementKind::kContiguous, PlacementKind::kZigzag}) {
    for (const auto strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
      SCOPED_TRACE(Str(ToString(placement), " ", ToString(strategy)));
      o.placement = placement;
      o.strategy.kind = strategy;
      ExpectEqual(Train(o, 1, 2), one, 1e-9);
    }
  }
  o.micro_batch_rows = 2;
  o.model.recompute_layers = true;
  ExpectEqual(Train(o, 2, 2), one, 1e-9);
}

TEST(DuoLayoutTest, SinglePrecision) {
  TemporaryFolder folder;
  WriteCorpus((folder.path() / "train").string(), 19, 200, 300, 1);
  const TrainOptions o = LayoutOptions(folder, DType::kF32);
  ExpectEqual(Train(o, 2, 2), Train(o, 1, 1), 1e-4);
}

// Documents that begin with 64 tokens of the ids 0..3 and go on with the ids 4..7, so that their
// average over all of the past differs from that over the last tokens.
void WriteDriftingCorpus(const std::string& prefix) {
  data::IndexWriter writer(prefix, data::TokenDTypeForVocabulary(19));
  const Philox rng(3, StreamOf("drifting corpus"));
  uint64_t n = 0;
  for (int document = 0; document < 40; ++document) {
    std::vector<int32_t> ids;
    for (int i = 0; i < 256; ++i) {
      ids.push_back(static_cast<int32_t>(rng.Below(n++, 4)) + (i < 64 ? 0 : 4));
    }
    ids.push_back(18);
    writer.Append(ids);
    writer.EndDocument();
  }
  writer.Commit();
}

// One layer with two kv heads: the scores of head 0 fall so steeply with the distance that it sees
// little but its own token, head 1 averages over everything.
TEST(DuoLayoutTest, HeadsThatNeedOnlyNearContextClose) {
  TemporaryFolder folder;
  WriteDriftingCorpus((folder.path() / "train").string());
  TrainOptions o;
  o.model = GatedModel(DType::kF32, /*sinks=*/4, /*recent=*/32);
  o.model.num_heads = o.model.num_kv_heads = 2;
  o.model.mixers.pop_back();
  o.model.layers = {0};
  o.model.embedding_init_std = 1;
  o.objective = DuoObjective(0.0005);
  o.steps = 60;
  o.context_length = 256;
  o.global_batch_tokens = 512;
  o.train = {{(folder.path() / "train").string(), 1}};
  o.adamw.lr = 0.05;

  Context ctx(ContextOptions{.threads = 2});
  parallel::SelfCommunicator world;
  parallel::DeviceMesh mesh(world, {.dp = 1, .cp = 1});
  Trainer trainer(ctx, mesh, o);
  const int64_t width = o.model.hidden_size, dim = o.model.head_dim;
  const auto weight = [&](const char* name) {
    return trainer.parameters().Find(name).value.data<float>();
  };
  float* embedding = weight("model.embed_tokens.weight");
  // All tokens of one length, so that no key is larger than others.
  for (int64_t token = 0; token < o.model.vocab_size; ++token) {
    float* row = embedding + token * width;
    row[0] = 0;
    const float square = std::inner_product(row, row + width, row, 0.0f);
    for (int64_t d = 1; d < width; ++d) row[d] *= std::sqrt(15.0f / square);
    row[0] = 4;
  }
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"}) {
    float* rows = weight(name);
    std::fill(rows, rows + 2 * dim * width, 0.0f);
    // The constant element of the embedding into the first half of head 0: RoPE makes a sum of
    // cosines of the distance of it, with frequencies from 1 to 1 / 1000.
    for (int64_t row = 0; row < dim / 2; ++row) rows[row * width] = 4;
  }
  while (trainer.step() < o.steps) trainer.Step();
  const Vec gates = GatesOf(trainer);
  ASSERT_EQ(gates.size(), 2u);
  EXPECT_LT(gates[0], 0.05);
  EXPECT_GT(gates[1], 0.7);
}

}  // namespace
}  // namespace longspan::test
