// Runs that train gates: what they change, what they keep, how they start and go on.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "ops/elementwise/elementwise.h"
#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/support/device.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/duo_support.h"
#include "trainer/checkpoint/writer.h"
#include "trainer/loop.h"

namespace longspan::test {
namespace {

using namespace trainer;

class DuoTrainingTest : public ::testing::Test {
 protected:
  DuoTrainingTest() { WriteCorpus((folder_.path() / "train").string(), 19, 100, 300, 1); }

  TrainOptions Options() const {
    TrainOptions o;
    o.model = GatedModel(DType::kF32, 3, 20);
    o.objective = DuoObjective(0.05);
    o.steps = 5;
    o.context_length = 128;
    o.global_batch_tokens = 256;  // two micro-batches
    o.train = {{(folder_.path() / "train").string(), 1}};
    o.adamw.lr = 0.02;
    return o;
  }
  TrainOptions Dense() const {
    TrainOptions o = Options();
    o.model.mixers.erase(o.model.mixers.begin());
    o.model.layers = {0, 0, 0};
    o.model.gates_only = false;
    o.objective = {};
    o.adamw.lr = 1e-2;
    return o;
  }

  // Saves the state of a trainer and opens it again.
  CheckpointReader Saved(Trainer& trainer, parallel::Communicator& world, const char* name) const {
    CheckpointWriter writer({.directory = folder_.path() / name}, world);
    writer.Save(trainer.Info("config"), trainer.State());
    writer.Wait();
    return CheckpointReader::Open(folder_.path() / name / Str("step_0000000", trainer.step()));
  }

  TemporaryFolder folder_;
};

struct OneRun {
  explicit OneRun(const TrainOptions& options)
      : ctx({.device = TestDevice(), .threads = 2, .poison_buffers = true}) {
    world.UseDevice(ctx.runtime());
    trainer = std::make_unique<Trainer>(ctx, mesh, options);
  }
  // Gates in the order of their layers and heads; all other weights by name.
  Vec Gates() const {
    Vec gates;
    for (const NamedTensor& t : trainer->State()) {
      if (!t.name.starts_with("weights/") || !IsGateName(t.name)) continue;
      const Vec values = ToVec(t.tensor);
      gates.insert(gates.end(), values.begin(), values.end());
    }
    return gates;
  }
  std::map<std::string, Vec> Frozen() const {
    std::map<std::string, Vec> frozen;
    for (const NamedTensor& t : trainer->State()) {
      if (t.name.starts_with("weights/") && !IsGateName(t.name)) frozen[t.name] = ToVec(t.tensor);
    }
    return frozen;
  }
  std::map<std::string, Vec> State() const {
    std::map<std::string, Vec> state;
    for (const NamedTensor& t : trainer->State()) state[t.name] = ToVec(t.tensor);
    return state;
  }
  void SetGates(double value) {
    for (Bucket& b : trainer->parameters().buckets()) {
      if (b.trained_end == 0) continue;
      Tensor gates = b.master.Rows(0, b.trained_end);
      ops::Fill(ctx, gates, value);
    }
  }

  Context ctx;
  parallel::SelfCommunicator world;
  parallel::DeviceMesh mesh{world, {.dp = 1, .cp = 1}};
  std::unique_ptr<Trainer> trainer;
};

TEST_F(DuoTrainingTest, OnlyGatesChangeAndOnlyTheyHaveState) {
  OneRun run(Options());
  const auto before = run.Frozen();
  EXPECT_EQ(before.size(), 3u + 3 * 9);  // embedding, last norm, output; nine a layer
  EXPECT_EQ(run.Gates(), Vec(4, 1.0));
  std::vector<double> losses;
  for (int step = 0; step < 3; ++step) {
    const StepResult r = run.trainer->Step();
    losses.push_back(r.loss);
    ASSERT_TRUE(r.mean_gate.has_value());
    EXPECT_EQ(*r.mean_gate == 1.0, step == 0);  // of the gates before the step
    EXPECT_GT(r.grad_norm, 0);
  }
  EXPECT_EQ(run.Frozen(), before);
  for (const double gate : run.Gates()) EXPECT_LT(gate, 1.0);
  EXPECT_NEAR(losses[0], 0.05, 1e-6);  // open gates: only their price

  std::set<std::string> moments;
  for (const auto& [name, values] : run.State()) {
    if (!name.starts_with("weights/")) moments.insert(name);
  }
  EXPECT_EQ(moments, (std::set<std::string>{"adamw.m/model.layers.0.self_attn.duo_alpha",
                                            "adamw.m/model.layers.2.self_attn.duo_alpha",
                                            "adamw.v/model.layers.0.self_attn.duo_alpha",
                                            "adamw.v/model.layers.2.self_attn.duo_alpha"}));
  const auto elements = [&](auto buffer) {
    int64_t n = 0;
    for (const Bucket& b : run.trainer->parameters().buckets()) n += (b.*buffer).numel();
    return n;
  };
  EXPECT_EQ(elements(&Bucket::grad), 4);
  EXPECT_EQ(elements(&Bucket::m), 4);
  EXPECT_EQ(elements(&Bucket::v), 4);
  EXPECT_EQ(CountTrainedParameters(Options().model), 4);
  EXPECT_EQ(CountTrainedParameters(Dense().model), CountParameters(Dense().model));
}

// A step much longer than the range of a gate ends at its end.
TEST_F(DuoTrainingTest, GatesStayBetweenZeroAndOne) {
  TrainOptions o = Options();
  o.adamw.lr = 3;
  o.objective.regularization = 100;
  OneRun closing(o);
  for (int step = 0; step < 2; ++step) {
    closing.trainer->Step();
    EXPECT_EQ(closing.Gates(), Vec(4, 0.0));
  }
  o.objective.regularization = 0;
  OneRun opening(o);
  opening.SetGates(0.25);  // the distance from the dense model opens them
  opening.trainer->Step();
  for (const double gate : opening.Gates()) EXPECT_TRUE(gate == 0 || gate == 1) << gate;
  const Vec gates = opening.Gates();
  EXPECT_GT(std::count(gates.begin(), gates.end(), 1.0), 0);
}

TEST_F(DuoTrainingTest, AResumedRunGoesOnWithTheSameBits) {
  for (const bool recompute : {false, true}) {
    TrainOptions o = Options();
    o.model.recompute_layers = recompute;
    OneRun whole(o), first(o), second(o);
    for (int step = 0; step < 5; ++step) whole.trainer->Step();
    for (int step = 0; step < 2; ++step) first.trainer->Step();
    second.trainer->Resume(Saved(*first.trainer, first.world, recompute ? "again" : "kept"));
    EXPECT_EQ(second.State(), first.State());
    for (int step = 0; step < 3; ++step) second.trainer->Step();
    EXPECT_EQ(second.State(), whole.State());
    EXPECT_NE(second.Gates(), first.Gates());
  }
}

TEST_F(DuoTrainingTest, ResumingWithAnotherObjectiveIsRefused) {
  OneRun run(Options());
  run.trainer->Step();
  const CheckpointReader reader = Saved(*run.trainer, run.world, "checkpoints");
  TrainOptions o = Options();
  o.objective.regularization = 0.1;
  OneRun other(o);
  try {
    other.trainer->Resume(reader);
    ADD_FAILURE() << "resumed";
  } catch (const Error& e) {  // of one rank, raised on all
    EXPECT_NE(std::string(e.what()).find("objective"), std::string::npos) << e.what();
  }
}

// Dense weights get gates, and a model that uses what they have found out does without them.
TEST_F(DuoTrainingTest, GatesComeAndGoBetweenRuns) {
  OneRun dense(Dense());
  for (int step = 0; step < 2; ++step) dense.trainer->Step();
  TrainOptions o = Options();
  o.seed = 7;  // so that weights which were not read show
  OneRun gated(o);
  EXPECT_NE(gated.Frozen(), dense.Frozen());
  gated.SetGates(0.5);
  gated.SetGates(1);
  const std::string note = gated.trainer->InitFrom(Saved(*dense.trainer, dense.world, "dense"));
  EXPECT_NE(note.find("it lacks 2 tensors of gates"), std::string::npos) << note;
  EXPECT_EQ(gated.Frozen(), dense.Frozen());
  EXPECT_EQ(gated.Gates(), Vec(4, 1.0));
  gated.trainer->Step();

  TrainOptions later = Dense();
  later.seed = 8;
  OneRun spans(later);
  const CheckpointReader trained = Saved(*gated.trainer, gated.world, "gated");
  const std::string dropped = spans.trainer->InitFrom(trained);
  EXPECT_NE(dropped.find("its 2 tensors of gates have no place here"), std::string::npos)
      << dropped;
  EXPECT_EQ(spans.Frozen(), dense.Frozen());
  o.seed = 9;
  OneRun again(o);
  EXPECT_EQ(again.trainer->InitFrom(trained).find("gates"), std::string::npos);
  EXPECT_EQ(again.Gates(), gated.Gates());

  TrainOptions wider = o;  // everything but gates is as strict as ever
  wider.model.ffn_hidden_size = 32;
  OneRun unfit(wider);
  EXPECT_THROW(unfit.trainer->InitFrom(trained), Error);
}

// Nothing travels for frozen weights: two buckets of gates and the sums of the step.
TEST_F(DuoTrainingTest, OnlyGradientsOfGatesTravel) {
  parallel::RunLocal(2, [&](parallel::Communicator& inner) {
    parallel::CountingCommunicator world(inner);
    Context ctx({.device = TestDevice(), .threads = 1});
    world.UseDevice(ctx.runtime());
    parallel::DeviceMesh mesh(world, {.dp = 2, .cp = 1});
    TrainOptions o = Options();
    o.dp = 2;
    Trainer trainer(ctx, mesh, o);
    trainer.Step();
    world.ResetCounts();
    trainer.Step();
    EXPECT_EQ(world.counts()[parallel::CommOp::kAllReduce].calls, 3);
    EXPECT_EQ(world.counts().Total().calls, 3);
  });
}

TEST_F(DuoTrainingTest, MetricsSayWhatTheLossIs) {
  const auto train = [&](const TrainOptions& o, const char* name, const std::string& init_from) {
    Context ctx({.device = TestDevice(), .threads = 2});
    parallel::SelfCommunicator self;
    parallel::CountingCommunicator world(self);
    world.UseDevice(ctx.runtime());
    parallel::DeviceMesh mesh(world, {.dp = 1, .cp = 1});
    RunSettings settings;
    settings.run_directory = folder_.path() / name;
    settings.init_from = init_from;
    settings.config_text = "test";
    settings.quiet = true;
    return RunTraining(ctx, mesh, world, o, settings);
  };
  train(Dense(), "dense", "");
  EXPECT_THROW(train(Options(), "none", ""), ConfigError);  // gates of a model nobody has trained
  train(Options(), "gates", (folder_.path() / "dense").string());
  std::ifstream in(folder_.path() / "gates" / "metrics.jsonl");
  int lines = 0;
  for (std::string line; std::getline(in, line); ++lines) {
    const auto json = nlohmann::json::parse(line);
    EXPECT_EQ(json["objective"], "duo_gates");
    EXPECT_EQ(json["mean_gate"] == 1.0, lines == 0);
  }
  EXPECT_EQ(lines, 5);
  std::ifstream dense(folder_.path() / "dense" / "metrics.jsonl");
  std::string line;
  std::getline(dense, line);
  EXPECT_FALSE(nlohmann::json::parse(line).contains("mean_gate"));
}

}  // namespace
}  // namespace longspan::test
