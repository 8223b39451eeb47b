// Every strategy x placement x pattern x rank count equals attention on one rank, in f64, forward
// and backward, and sends exactly the bytes that the plan says. Lower precisions stay as near to
// f64 as one rank does.
#include "parallel/context/strategy.h"

#include <gtest/gtest.h>

#include <functional>
#include <mutex>

#include "ops/core/rng.h"
#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/support/numeric.h"

namespace longspan::test {
namespace {

using namespace parallel;

struct Case {
  std::string name;
  ops::AttentionPattern pattern;
  std::vector<std::vector<int64_t>> ends;  // documents of each row
  int64_t row_length;
  PlacementKind placement;
  StrategyKind strategy;
  int ranks;
  DType dtype = DType::kF64;
};

constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 8;

struct Tensors {
  Vec q, k, v, d_out;
};

// Gathers a [rows * length, width] array into global order from the rank-local parts.
void Scatter(const Placement& placement, int rank, int64_t width, const Vec& local, Vec& global) {
  std::vector<int64_t> index(static_cast<size_t>(placement.rows() * placement.row_length()));
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i);
  const auto mine = placement.Slice(index, rank);
  ASSERT_EQ(local.size(), mine.size() * static_cast<size_t>(width));
  for (size_t t = 0; t < mine.size(); ++t) {
    for (int64_t d = 0; d < width; ++d) {
      global[static_cast<size_t>(mine[t] * width + d)] =
          local[t * static_cast<size_t>(width) + static_cast<size_t>(d)];
    }
  }
}

Vec Pick(const Placement& placement, int rank, int64_t width, const Vec& global) {
  std::vector<int64_t> index(static_cast<size_t>(placement.rows() * placement.row_length()));
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i);
  Vec local;
  for (int64_t t : placement.Slice(index, rank)) {
    local.insert(local.end(), global.begin() + t * width, global.begin() + (t + 1) * width);
  }
  return local;
}

struct Outcome {
  Vec o, lse, dq, dk, dv;
};
constexpr std::pair<const char*, Vec Outcome::*> kOutputs[] = {{"o", &Outcome::o},
                                                               {"lse", &Outcome::lse},
                                                               {"dq", &Outcome::dq},
                                                               {"dk", &Outcome::dk},
                                                               {"dv", &Outcome::dv}};

Tensors Inputs(int64_t tokens, DType representable) {
  return {Normal(tokens * kHeads * kDim, 1, representable),
          Normal(tokens * kKvHeads * kDim, 2, representable),
          Normal(tokens * kKvHeads * kDim, 3, representable),
          Normal(tokens * kHeads * kDim, 4, representable)};
}

Outcome RunCase(const Case& c, const Tensors& in) {
  auto documents =
      std::make_shared<const ops::Documents>(ops::Documents::FromEnds(c.row_length, c.ends));
  const int64_t rows = static_cast<int64_t>(c.ends.size()), tokens = rows * c.row_length;
  const Placement placement(c.placement, rows, c.row_length, c.ranks);
  Outcome all;
  all.o.resize(static_cast<size_t>(tokens * kHeads * kDim));
  all.dq = all.o;
  all.lse.resize(static_cast<size_t>(tokens * kHeads));
  all.dk.resize(static_cast<size_t>(tokens * kKvHeads * kDim));
  all.dv = all.dk;
  std::mutex mutex;
  RunLocal(c.ranks, [&](Communicator& world) {
    CountingCommunicator comm(world);
    Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
    ctx.SetProgress([&] { comm.Progress(); });
    const int rank = comm.rank();
    const int64_t t = placement.local_tokens();
    auto local = [&](const Vec& global, int64_t heads) {
      return FromVec(ctx, {t, heads, kDim}, c.dtype, Pick(placement, rank, heads * kDim, global));
    };
    const Tensor q = local(in.q, kHeads), k = local(in.k, kKvHeads), v = local(in.v, kKvHeads);
    const Tensor d_out = local(in.d_out, kHeads);
    const auto plan = MakePlan(c.pattern, kKvHeads, documents, placement, c.strategy, rank);
    const auto traffic = PlannedTraffic(*plan, t, kKvHeads, kDim, c.dtype);

    const auto saved = ContextAttentionForward(ctx, comm, *plan, q, k, v);
    EXPECT_EQ(comm.counts().Total().bytes, traffic.forward_bytes);
    comm.ResetCounts();
    const auto grads = ContextAttentionBackward(ctx, comm, *plan, d_out, q, k, v, saved);
    EXPECT_EQ(comm.counts().Total().bytes, traffic.backward_bytes);

    std::lock_guard lock(mutex);
    Scatter(placement, rank, kHeads * kDim, ToVec(saved.o), all.o);
    Scatter(placement, rank, kHeads, ToVec(saved.lse), all.lse);
    Scatter(placement, rank, kHeads * kDim, ToVec(grads.dq), all.dq);
    Scatter(placement, rank, kKvHeads * kDim, ToVec(grads.dk), all.dk);
    Scatter(placement, rank, kKvHeads * kDim, ToVec(grads.dv), all.dv);
  });
  return all;
}

std::vector<std::pair<std::string, ops::AttentionPattern>> Patterns() {
  ops::S2Options s2{.block_size = 64, .local_blocks = 1, .stride_blocks = 2};
  ops::S2Options wide{.block_size = 128, .local_blocks = 1, .stride_blocks = 3, .dense_heads = 1};
  return {{"causal", ops::AttentionPattern::Causal()},
          {"full", ops::AttentionPattern::Full()},
          {"window", ops::AttentionPattern::Window(100, 5)},
          {"s2", ops::AttentionPattern::S2(s2)},
          {"s2_wide", ops::AttentionPattern::S2(wide)}};
}

// The full product for `ranks`; `sample` keeps one case in that many, chosen by a fixed seed.
void RunProduct(const std::vector<int>& rank_counts, uint64_t sample) {
  int ran = 0;
  uint64_t index = 0;
  const Philox rng(7, StreamOf("strategy cases"));
  for (int ranks : rank_counts) {
    for (PlacementKind placement : {PlacementKind::kContiguous, PlacementKind::kZigzag}) {
      const int64_t granule =
          ranks == 1 ? 64 : 64 * ranks * (placement == PlacementKind::kZigzag ? 2 : 1);
      const int64_t length = granule * ((granule < 512) ? 512 / granule : 1);
      const std::vector<std::vector<std::vector<int64_t>>> layouts = {
          {{length}}, {{10, 70, 71, length / 2 + 3, length}, {length / 3, length}}};
      for (size_t layout = 0; layout < layouts.size(); ++layout) {
        for (const auto& [name, pattern] : Patterns()) {
          // One rank is the truth for both strategies.
          Case truth{name,
                     pattern,
                     layouts[layout],
                     length,
                     PlacementKind::kContiguous,
                     StrategyKind::kRing,
                     1};
          const int64_t tokens = length * static_cast<int64_t>(layouts[layout].size());
          std::unique_ptr<Outcome> expected;
          Tensors in;
          for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
            if (rng.Below(index++, sample) != 0) continue;
            if (expected == nullptr) {
              in = Inputs(tokens, DType::kF64);
              expected = std::make_unique<Outcome>(RunCase(truth, in));
            }
            const Case c{name, pattern, layouts[layout], length, placement, strategy, ranks};
            SCOPED_TRACE(Str(name, " layout ", layout, " ", ToString(placement), " ",
                             ToString(strategy), " on ", ranks));
            const Outcome got = RunCase(c, in);
            for (const auto& [output, vec] : kOutputs) {
              EXPECT_LT(RelMax(got.*vec, (*expected).*vec), 1e-12) << output;
            }
            ++ran;
          }
        }
      }
    }
  }
  ::testing::Test::RecordProperty("cases", ran);
  EXPECT_GT(ran, 0);
}

TEST(StrategyTest, EveryCombinationOnTwoRanksEqualsOneRank) { RunProduct({2}, 1); }
TEST(StrategyTest, SampleUpToEightRanksEqualsOneRank) { RunProduct({1, 3, 4, 5, 8}, 4); }
TEST(StrategyExhaustiveTest, EveryCombinationUpToEightRanksEqualsOneRank) {
  RunProduct({1, 2, 3, 4, 5, 6, 7, 8}, 1);
}

// Calls check(case, f64 on one rank, the case's dtype on one rank, the case) for 2 and 4 ranks in
// both strategies and placements.
void RunLowPrecision(
    DType dtype,
    const std::function<void(const Case&, const Outcome&, const Outcome&, const Outcome&)>& check) {
  const int64_t length = 512;
  const std::vector<std::vector<int64_t>> ends = {{10, 70, 71, 300, length}, {length}};
  const Tensors in = Inputs(2 * length, DType::kBF16);
  for (const auto& [name, pattern] : Patterns()) {
    Case c{name, pattern, ends, length, PlacementKind::kContiguous, StrategyKind::kRing, 1};
    const Outcome exact = RunCase(c, in);
    c.dtype = dtype;
    const Outcome one = RunCase(c, in);
    for (const int ranks : {2, 4}) {
      for (PlacementKind placement : {PlacementKind::kContiguous, PlacementKind::kZigzag}) {
        for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
          c.ranks = ranks, c.placement = placement, c.strategy = strategy;
          SCOPED_TRACE(Str(name, " ", ToString(placement), " ", ToString(strategy), " on ", ranks));
          check(c, exact, one, RunCase(c, in));
        }
      }
    }
  }
}

TEST(StrategyTest, SinglePrecisionFollowsF64) {
  RunLowPrecision(DType::kF32,
                  [](const Case&, const Outcome& exact, const Outcome&, const Outcome& got) {
                    for (const auto& [output, vec] : kOutputs) {
                      EXPECT_LT(RelMax(got.*vec, exact.*vec), 1e-5) << output;
                    }
                  });
}

TEST(StrategyTest, Bf16IsAsNearToF64AsOneRank) {
  RunLowPrecision(DType::kBF16, [](const Case&, const Outcome& exact, const Outcome& one,
                                   const Outcome& got) {
    for (const auto& [output, vec] : kOutputs) {
      // Partial results travel and merge in f32, so nothing is rounded to bf16 twice.
      EXPECT_LT(RelRms(got.*vec, exact.*vec), 1.1 * RelRms(one.*vec, exact.*vec) + 1e-6) << output;
    }
  });
}

// RunCase compares what is sent with PlannedTraffic; here that is counted by hand.
TEST(StrategyTest, Bf16SendsKeysInTwoBytesAndTheirGradientsInFour) {
  const int64_t tokens = 512 / 4, elements = 2 * tokens * kKvHeads * kDim;
  auto documents = std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(1, 512));
  const Placement placement(PlacementKind::kZigzag, 1, 512, 4);
  for (StrategyKind strategy : {StrategyKind::kRing, StrategyKind::kAllGather}) {
    const auto plan = MakePlan(ops::AttentionPattern::Causal(), kKvHeads, documents, placement,
                               strategy, /*rank=*/1);
    const auto traffic = PlannedTraffic(*plan, tokens, kKvHeads, kDim, DType::kBF16);
    // The backward pass of the ring starts from the keys that the forward pass received last.
    const int64_t key_steps = strategy == StrategyKind::kRing ? 2 : 3;
    EXPECT_EQ(traffic.forward_bytes, 3 * 2 * elements) << ToString(strategy);
    EXPECT_EQ(traffic.backward_bytes, (key_steps * 2 + 3 * 4) * elements) << ToString(strategy);
  }
}

TEST(StrategyTest, PlanOfAnotherRankIsRefused) {
  Context ctx(ContextOptions{.threads = 1});
  auto documents = std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(1, 256));
  const Placement placement(PlacementKind::kZigzag, 1, 256, 2);
  const auto plan =
      MakePlan(ops::AttentionPattern::Causal(), 1, documents, placement, StrategyKind::kRing, 1);
  auto self = std::make_unique<SelfCommunicator>();
  const Tensor q = ctx.Zeros({128, 1, 8}, DType::kF64);
  EXPECT_THROW(ContextAttentionForward(ctx, *self, *plan, q, q, q), InvalidArgument);
}

TEST(PlacementTest, ZigzagPairsEarlyAndLateParts) {
  const Placement p(PlacementKind::kZigzag, 2, 512, 2);
  EXPECT_EQ(p.parts(0), (std::vector<TokenRange>{{0, 128}, {384, 512}}));
  EXPECT_EQ(p.parts(1), (std::vector<TokenRange>{{128, 256}, {256, 384}}));
  EXPECT_EQ(p.blocks(0).ids, (std::vector<int32_t>{0, 1, 6, 7, 8, 9, 14, 15}));
}

TEST(PlacementTest, EveryTokenHasOneOwner) {
  for (PlacementKind kind : {PlacementKind::kContiguous, PlacementKind::kZigzag}) {
    const Placement p(kind, 3, 128 * 3, 3);
    std::vector<int> owners(static_cast<size_t>(3 * 128 * 3));
    std::vector<int64_t> index(owners.size());
    for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i);
    for (int r = 0; r < 3; ++r) {
      for (int64_t t : p.Slice(index, r)) ++owners[static_cast<size_t>(t)];
    }
    for (int n : owners) EXPECT_EQ(n, 1);
  }
}

TEST(PlacementTest, ProblemNamesUsableLengths) {
  const std::string text = Placement::Problem(PlacementKind::kZigzag, 1000, 2);
  EXPECT_NE(text.find("768"), std::string::npos) << text;
  EXPECT_NE(text.find("1024"), std::string::npos) << text;
  EXPECT_EQ(Placement::Problem(PlacementKind::kContiguous, 1000, 1), "");
}

}  // namespace
}  // namespace longspan::test
