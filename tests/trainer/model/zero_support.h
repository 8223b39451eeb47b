#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "tests/support/device.h"
#include "tests/support/numeric.h"
#include "tests/trainer/model/model_support.h"
#include "trainer/trainer.h"

namespace longspan::test {

struct ZeroLayout {
  int dp = 1, cp = 1;
  int stage = 0;
  int64_t hybrid_shard = 0;

  int ranks() const { return dp * cp; }
  std::string Name() const {
    return Str("dp ", dp, " cp ", cp, " stage ", stage, " groups of ", hybrid_shard);
  }
  void Set(trainer::TrainOptions& o) const {
    o.dp = dp;
    o.cp = cp;
    o.zero_stage = stage;
    o.hybrid_shard = hybrid_shard;
  }
};

struct ZeroRun {
  std::vector<double> losses, norms;
  double validation = 0;
  std::map<std::string, Vec> state;  // whole tensors, by the names of checkpoints

  std::map<std::string, Vec> Weights() const {
    std::map<std::string, Vec> weights;
    for (const auto& [name, values] : state) {
      if (name.starts_with("weights/")) weights[name] = values;
    }
    return weights;
  }
};

// The values of a tensor wherever it is, moments in host memory of a GPU included.
inline Vec ValuesOf(const Tensor& t) {
  Context host({.threads = 1});
  const Tensor copy = host.Empty(t.shape(), t.dtype());
  t.ReadTo(copy.raw());
  return ToVec(copy);
}

// Puts what the ranks hold of a run's state together. Each element must come from somewhere, and
// where several ranks hold it they must have the same bits.
class StateCollector {
 public:
  void Add(trainer::Trainer& trainer) {
    for (const trainer::NamedTensor& t : trainer.State()) {
      const Vec part = ValuesOf(t.tensor);
      const std::lock_guard lock(mutex_);
      Vec& whole = state_[t.name];
      const size_t elements =
          static_cast<size_t>(t.piece.has_value() ? t.piece->shape.numel() : t.tensor.numel());
      if (whole.empty()) whole.assign(elements, kMissing);
      for (size_t i = 0; i < part.size(); ++i) {
        double& value = whole[static_cast<size_t>(t.begin()) + i];
        EXPECT_TRUE(value == kMissing || value == part[i]) << t.name << " at " << i;
        value = part[i];
      }
    }
  }
  std::map<std::string, Vec> Take() {
    for (const auto& [name, values] : state_) {
      for (const double value : values) {
        if (value == kMissing) ADD_FAILURE() << name << " is on no rank";
      }
    }
    return std::move(state_);
  }

 private:
  static constexpr double kMissing = 1e300;  // no weight
  std::mutex mutex_;
  std::map<std::string, Vec> state_;
};

// What one rank of a run does with its Trainer, between construction and the collection of state.
using RankBody = std::function<void(parallel::CountingCommunicator& world, trainer::Trainer&)>;

// Runs `body` on every rank of the layout, then steps up to number `until` (absent: all that are
// left) and an evaluation.
inline ZeroRun RunZero(trainer::TrainOptions o, const ZeroLayout& layout,
                       const RankBody& body = nullptr, std::optional<int64_t> until = {}) {
  layout.Set(o);
  ZeroRun result;
  StateCollector state;
  std::mutex mutex;
  parallel::RunLocal(layout.ranks(), [&](parallel::Communicator& inner) {
    Context ctx({.device = TestDevice(), .threads = 1, .poison_buffers = true});
    parallel::CountingCommunicator world(inner);
    world.UseDevice(ctx.runtime());
    parallel::DeviceMesh mesh(world, {.dp = layout.dp, .cp = layout.cp});
    ctx.SetProgress([&] { world.Progress(); });
    trainer::Trainer trainer(ctx, mesh, o);
    if (body) body(world, trainer);
    ZeroRun mine;
    while (trainer.step() < until.value_or(o.steps)) {
      const trainer::StepResult step = trainer.Step();
      mine.losses.push_back(step.loss);
      mine.norms.push_back(step.grad_norm);
    }
    if (!o.validation.empty()) mine.validation = trainer.Evaluate().loss;
    state.Add(trainer);
    const std::lock_guard lock(mutex);
    if (world.rank() > 0 && !result.losses.empty()) {
      EXPECT_EQ(result.losses, mine.losses) << "ranks disagree";
      EXPECT_EQ(result.norms, mine.norms) << "ranks disagree";
      EXPECT_EQ(result.validation, mine.validation) << "ranks disagree";
    }
    result.losses = mine.losses;
    result.norms = mine.norms;
    result.validation = mine.validation;
  });
  result.state = state.Take();
  return result;
}

inline void ExpectNear(const ZeroRun& got, const ZeroRun& expected, double tolerance) {
  ASSERT_EQ(got.losses.size(), expected.losses.size());
  EXPECT_LT(RelMax(got.losses, expected.losses), tolerance);
  EXPECT_LT(RelMax(got.norms, expected.norms), tolerance);
  EXPECT_NEAR(got.validation, expected.validation, tolerance * expected.validation);
  ASSERT_EQ(got.state.size(), expected.state.size());
  for (const auto& [name, values] : expected.state) {
    const auto found = got.state.find(name);
    ASSERT_NE(found, got.state.end()) << name;
    EXPECT_LT(RelMax(found->second, values), tolerance) << name;
  }
}

}  // namespace longspan::test
