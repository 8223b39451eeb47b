// The order in which sharded weights are collected and dropped, call by call: each layer's while
// the one before it is worked on, in both directions.
#include "trainer/model/weight_use.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "ops/core/check.h"

namespace longspan::trainer {
namespace {

class LoggingStore {
 public:
  explicit LoggingStore(std::string& log, bool sharded = true) : log_(log), sharded_(sharded) {}
  bool sharded() const { return sharded_; }
  void Hold(size_t bucket, std::optional<size_t> next) {
    log_ += Str("hold", bucket, next.has_value() ? Str("+", *next) : "", " ");
  }
  void Prefetch(size_t bucket) { log_ += Str("+", bucket, " "); }
  void Drop(size_t bucket) { log_ += Str("drop", bucket, " "); }
  void OpenGrads(size_t bucket) { log_ += Str("open", bucket, " "); }

 private:
  std::string& log_;
  const bool sharded_;
};

class FakeTape {
 public:
  explicit FakeTape(bool recording) : recording_(recording) {}
  bool recording() const { return recording_; }
  void Record(std::function<void()> entry) {
    if (recording_) entries_.push_back(std::move(entry));
  }
  void Backward() {
    for (; !entries_.empty(); entries_.pop_back()) entries_.back()();
  }

 private:
  const bool recording_;
  std::vector<std::function<void()>> entries_;
};

struct Pass {
  bool recording = true, tied = false, sharded = true;
  std::vector<bool> differentiated = {true, true};  // of the layers
};

// What a decoder does: "e", "1", "2", "h" run the embedding, layers and head; capitals
// differentiate.
std::string LogOf(const Pass& pass) {
  std::string log;
  LoggingStore store(log, pass.sharded);
  FakeTape tape(pass.recording);
  WeightUse weights(tape, store, pass.tied);
  const auto work = [&](const std::string& forward, const std::string& backward) {
    log += forward + " ";
    tape.Record([&log, backward] { log += backward + " "; });
  };
  weights.BeginEmbedding();
  work("e", "E");
  weights.EndEmbedding();
  const size_t layers = pass.differentiated.size();
  for (size_t i = 1; i <= layers; ++i) {
    const bool differentiated = pass.differentiated[i - 1];
    weights.BeginLayer(i, differentiated);
    work(Str(i), Str("L", i));
    weights.EndLayer(i, differentiated);
  }
  weights.BeginHead(layers + 1);
  work("h", "H");
  weights.EndHead(layers + 1);
  log += "| ";
  tape.Backward();
  return log;
}

TEST(WeightUseTest, LayersAreCollectedOneAhead) {
  EXPECT_EQ(LogOf({}),
            "hold0+1 e drop0 hold1+2 1 drop1 hold2+3 2 drop2 hold3 h | "
            "open3 +2 H drop3 open2 hold2+1 L2 drop2 open1 hold1 L1 drop1 open0 E ");
}

TEST(WeightUseTest, ATiedEmbeddingStaysUntilItsLastUse) {
  EXPECT_EQ(LogOf({.tied = true}),
            "hold0+1 e hold1+2 1 drop1 hold2+3 2 drop2 hold3 h | "
            "open3 open0 +2 H drop3 open2 hold2+1 L2 drop2 open1 hold1 L1 drop1 open0 E drop0 ");
}

TEST(WeightUseTest, WithoutABackwardPassNothingStays) {
  EXPECT_EQ(LogOf({.recording = false}),
            "hold0+1 e drop0 hold1+2 1 drop1 hold2+3 2 drop2 hold3 h drop3 | ");
  EXPECT_EQ(LogOf({.recording = false, .tied = true}),
            "hold0+1 e hold1+2 1 drop1 hold2+3 2 drop2 hold3 h drop3 drop0 | ");
}

TEST(WeightUseTest, WhatIsNotDifferentiatedIsNotCollectedAgain) {
  EXPECT_EQ(LogOf({.differentiated = {false, true, false}}),
            "hold0+1 e drop0 hold1+2 1 drop1 hold2+3 2 drop2 hold3+4 3 drop3 hold4 h | "
            "open4 +2 H drop4 L3 open2 hold2 L2 drop2 L1 open0 E ");
}

TEST(WeightUseTest, WholeStateCostsNothing) {
  EXPECT_EQ(LogOf({.sharded = false}), "e 1 2 h | H L2 L1 E ");
}

}  // namespace
}  // namespace longspan::trainer
