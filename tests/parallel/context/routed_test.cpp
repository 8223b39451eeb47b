// Routed attention over ranks equals its definition token by token, in f64, chooses the same
// blocks, and moves exactly the keys that were chosen and are not at home.
#include "parallel/context/routed.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "parallel/comm/simulated.h"
#include "tests/parallel/context/pairwise.h"
#include "tests/parallel/context/routed_cases.h"
#include "tests/support/device.h"

namespace longspan::test {
namespace {

using namespace parallel;

constexpr int64_t kEverything = int64_t{1} << 40;

struct Layout {
  int64_t row_length;
  std::vector<std::vector<int64_t>> ends;
};
const std::vector<Layout>& Layouts() {
  static const std::vector<Layout> layouts = {
      {576, {{576}}},
      {400, {{70, 71, 260, 400}, {400}}},  // two rows, the last block is short
      {150, {{150}}},                      // three mask blocks: most ranks are empty
      {640, {{40, 640}}},
  };
  return layouts;
}
constexpr PlacementKind kPlacements[] = {PlacementKind::kContiguous, PlacementKind::kZigzag,
                                         PlacementKind::kStriped, PlacementKind::kBalanced};
constexpr int kRanks[] = {1, 2, 3, 4, 8};
constexpr std::pair<int64_t, int64_t> kHeadCounts[] = {{4, 2}, {2, 2}, {3, 1}};
constexpr int64_t kBlockSizes[] = {64, 128, 192, 320};
constexpr int64_t kTopK[] = {1, 2, 3, 100};
constexpr int64_t kKeep[] = {0, 150, kEverything};
const std::vector<int> kDimensions = {4, 4, 5, 3, 4, 4, 3};

RoutedCase CaseOf(const Choice& choice) {
  const auto at = [&](size_t i) { return static_cast<size_t>(choice[i]); };
  const Layout& layout = Layouts()[at(0)];
  RoutedCase c;
  c.moba.problem = {.documents = std::make_shared<const ops::Documents>(
                        ops::Documents::FromEnds(layout.row_length, layout.ends)),
                    .block_size = kBlockSizes[at(4)],
                    .top_k = kTopK[at(5)],
                    .heads = kHeadCounts[at(3)].first,
                    .kv_heads = kHeadCounts[at(3)].second,
                    .dim = 4,
                    .scale = 0.4};
  c.moba.dtype = DType::kF64;
  c.placement = kPlacements[at(1)];
  c.ranks = kRanks[at(2)];
  c.keep_rows = kKeep[at(6)];
  return c;
}

// What the definition gives, kept for cases that differ only in how they run.
struct Truth {
  MobaInputs in;
  MobaChoice choice;
  MobaOutput out;
  MobaOracleGradients grads;
};
class Truths {
 public:
  const Truth& Of(const RoutedCase& c, const std::string& key) {
    Truth& truth = truths_[key];
    if (!truth.in.q.empty()) return truth;
    const MobaProblem& p = c.moba.problem;
    truth.in = MakeMobaInputs(c.moba);
    const MobaInputs& in = truth.in;
    truth.choice = MobaChoose(p, in.q, in.k);
    truth.out = MobaOracleForward(p, truth.choice, in.q, in.k, in.v);
    truth.grads = MobaOracleBackward(p, truth.choice, in.q, in.k, in.v, in.d_out);
    return truth;
  }

 private:
  std::map<std::string, Truth> truths_;
};

void ExpectBytes(const RoutedCase& c, const Truth& truth, const RoutedOutcome& got) {
  const MobaProblem& p = c.moba.problem;
  const RoutedNeed need = CountNeed(c, truth.choice);
  const int64_t row = 2 * p.dim * 8, others = c.ranks - 1;
  const int64_t control = need.width == 0 ? 0
                                          : others * (need.most_blocks * p.kv_heads * p.dim * 8 +
                                                      p.kv_heads * ((need.blocks + 7) / 8));
  for (size_t r = 0; r < got.forward.size(); ++r) {
    SCOPED_TRACE(Str("rank ", r));
    EXPECT_EQ(got.forward[r].payload, got.own_forward[r] + need.sent[r] * row);
    EXPECT_EQ(got.forward[r].control, control);
    EXPECT_EQ(got.forward[r].routed, got.forward[r].payload);
    EXPECT_EQ(got.backward[r].routed, got.backward[r].payload);
    EXPECT_EQ(got.planned_control[r], control);
    // Gradients of what it received go back; keys go again to those that did not keep them.
    int64_t again = 0;
    for (size_t to = 0; to < got.forward.size(); ++to) {
      if (need.received[to] > c.keep_rows) again += need.between[r][to];
    }
    EXPECT_EQ(got.backward[r].payload, got.own_backward[r] + (again + need.received[r]) * row);
    EXPECT_EQ(got.backward[r].control, 0);
    EXPECT_EQ(got.forward[r].calls, got.forward[0].calls);
    EXPECT_EQ(got.backward[r].calls, got.backward[0].calls);
  }
}

void ExpectEqualsDefinition(const RoutedCase& c, const Truth& truth) {
  SCOPED_TRACE(c.Name());
  const RoutedOutcome got = RunRouted(c, truth.in);
  EXPECT_EQ(ChoiceOf(c.moba, got.selected), truth.choice);
  EXPECT_LT(RelMax(got.o, truth.out.o), 1e-12);
  EXPECT_LT(RelMax(got.lse, truth.out.lse), 1e-12);
  EXPECT_LT(RelMax(got.dq, truth.grads.dq), 1e-12);
  EXPECT_LT(RelMax(got.dk, truth.grads.dk), 1e-12);
  EXPECT_LT(RelMax(got.dv, truth.grads.dv), 1e-12);
  ExpectBytes(c, truth, got);
}

std::string KeyOf(const Choice& choice) {
  return Str(choice[0], " ", choice[3], " ", choice[4], " ", choice[5]);
}

TEST(RoutedContextTest, SampleEqualsTheDefinition) {
  Truths truths;
  size_t ran = 0;
  for (const uint64_t seed : {11, 12, 13, 14}) {  // each meets all pairs of values
    for (const Choice& choice : AllPairs(kDimensions, seed)) {
      const RoutedCase c = CaseOf(choice);
      ExpectEqualsDefinition(c, truths.Of(c, KeyOf(choice)));
      if (HasFailure()) return;
      ++ran;
    }
  }
  EXPECT_LE(ran, 300u);
  std::printf("%zu cases\n", ran);
}

// All but what is kept, which goes in turn.
TEST(RoutedContextTest, ExhaustiveProductEqualsTheDefinition) {
  Truths truths;
  int cases = 0;
  Choice choice(kDimensions.size(), 0);
  for (;;) {
    choice.back() = cases++ % kDimensions.back();
    const RoutedCase c = CaseOf(choice);
    ExpectEqualsDefinition(c, truths.Of(c, KeyOf(choice)));
    if (HasFailure()) return;
    size_t i = 0;
    while (i + 1 < choice.size() && ++choice[i] == kDimensions[i]) choice[i++] = 0;
    if (i + 1 == choice.size()) break;
  }
  std::printf("%d cases\n", cases);
}

RoutedCase Striped(int ranks, DType dtype) {
  RoutedCase c = CaseOf({1, 2, 0, 0, 2, 2, 0});
  c.ranks = ranks;
  c.moba.dtype = dtype;
  return c;
}

// Neither another run nor fetching keys again changes a bit.
TEST(RoutedContextTest, RunsRepeatBitForBit) {
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    for (const PlacementKind placement : {PlacementKind::kStriped, PlacementKind::kZigzag}) {
      RoutedCase c = Striped(3, dtype);
      c.placement = placement;
      const MobaInputs in = MakeMobaInputs(c.moba);
      const RoutedOutcome first = RunRouted(c, in);
      for (const int64_t keep : {int64_t{0}, int64_t{150}, kEverything}) {
        c.keep_rows = keep;
        const RoutedOutcome again = RunRouted(c, in);
        EXPECT_EQ(again.selected, first.selected) << c.Name();
        EXPECT_EQ(again.o, first.o) << c.Name();
        EXPECT_EQ(again.lse, first.lse) << c.Name();
        EXPECT_EQ(again.dq, first.dq) << c.Name();
        EXPECT_EQ(again.dk, first.dk) << c.Name();
        EXPECT_EQ(again.dv, first.dv) << c.Name();
      }
    }
  }
}

// Keys that just fit stay, and one row less makes that rank fetch them again.
TEST(RoutedContextTest, TheBudgetOfKeptKeysIsExact) {
  RoutedCase c = Striped(3, DType::kF64);
  Truths truths;
  const Truth& truth = truths.Of(c, "");
  const RoutedNeed need = CountNeed(c, truth.choice);
  const int64_t most = *std::ranges::max_element(need.received);
  EXPECT_GT(most, 0);
  for (const int64_t keep : {most, most - 1}) {
    c.keep_rows = keep;
    ExpectEqualsDefinition(c, truth);
  }
}

// The modelled time of a pass is that of the nominal pairs.
TEST(RoutedContextTest, ComputingIsReported) {
  const RoutedCase c = Striped(3, DType::kF32);
  const MobaProblem& p = c.moba.problem;
  SimulatedNetwork network(3, {.intra = {1e-6, 1e9}, .flops_per_s = 1e9});
  RunLocal(3, [&](Communicator& world) {
    SimulatedCommunicator comm(world, network);
    Context ctx(ContextOptions{.threads = 1});
    const auto plan = MakeRoutedPlan({.block_size = p.block_size, .top_k = p.top_k}, p.kv_heads,
                                     p.documents, PlacementOf(c), {}, comm.rank());
    const Tensor q = ctx.Zeros({plan->local_tokens, p.heads, p.dim}, DType::kF32);
    const Tensor k = ctx.Zeros({plan->local_tokens, p.kv_heads, p.dim}, DType::kF32);
    const double seconds =
        static_cast<double>(plan->NominalPairs() * p.heads * p.dim) / network.options().flops_per_s;
    EXPECT_GT(seconds, 0);
    const RoutedResult saved = RoutedContextForward(ctx, comm, *plan, q, k, k);
    EXPECT_NEAR(comm.compute_s(), 4 * seconds, 1e-9 * seconds);
    RoutedContextBackward(ctx, comm, *plan, q, q, k, k, saved);
    EXPECT_NEAR(comm.compute_s(), 14 * seconds, 1e-9 * seconds);
  });
}

// Whole blocks inside one rank: own blocks need nothing of others, and what nobody of another rank
// chose is not sent.
TEST(RoutedContextTest, DocumentsInsideOneRankMoveNothing) {
  RoutedCase c = CaseOf({0, 0, 0, 0, 0, 3, 0});
  c.moba.problem.documents =
      std::make_shared<const ops::Documents>(ops::Documents::FromEnds(512, {{128, 256, 384, 512}}));
  c.ranks = 4;
  const RoutedOutcome got = RunRouted(c, MakeMobaInputs(c.moba));
  for (size_t r = 0; r < 4; ++r) {
    EXPECT_EQ(got.forward[r].payload, 0);
    EXPECT_EQ(got.backward[r].payload, 0);
    EXPECT_GT(got.forward[r].control, 0);
  }
}

TEST(RoutedContextTest, OneRankIsMobaForward) {
  Context ctx = Context(ContextOptions{.threads = 1});
  RoutedCase c = Striped(1, DType::kF32);
  const MobaInputs in = MakeMobaInputs(c.moba);
  const RoutedOutcome got = RunRouted(c, in);
  const MobaRun want = RunMoba(ctx, c.moba, in, "");
  EXPECT_EQ(got.selected, want.selected);
  EXPECT_EQ(got.o, want.o);
  EXPECT_EQ(got.dq, want.dq);
  EXPECT_EQ(got.dk, want.dk);
  EXPECT_EQ(got.dv, want.dv);
  EXPECT_EQ(got.forward[0].control + got.forward[0].payload + got.backward[0].payload, 0);
}

// Pairs of all ranks' tokens are those of one rank.
TEST(RoutedContextTest, NominalPairsAddUp) {
  for (const int top_k : {0, 2, 3}) {
    for (const PlacementKind kind : kPlacements) {
      RoutedCase c = CaseOf({1, 0, 0, 0, 1, top_k, 0});
      const auto pairs_on = [&](int ranks) {
        c.ranks = ranks;
        c.placement = kind;
        int64_t pairs = 0;
        for (int r = 0; r < ranks; ++r) {
          pairs += MakeRoutedPlan({.block_size = 128, .top_k = c.moba.problem.top_k}, 2,
                                  c.moba.problem.documents, PlacementOf(c), {}, r)
                       ->NominalPairs();
        }
        return pairs;
      };
      EXPECT_EQ(pairs_on(3), pairs_on(1)) << ToString(kind) << " " << top_k;
    }
  }
}

TEST(RoutedContextTest, RefusesWhatDoesNotFit) {
  const RoutedCase c = Striped(2, DType::kF32);
  const MobaProblem& p = c.moba.problem;
  const auto plan = MakeRoutedPlan({.block_size = 192, .top_k = 2}, p.kv_heads, p.documents,
                                   PlacementOf(c), {}, 0);
  SelfCommunicator one;
  Context ctx;
  const Tensor q = ctx.Zeros({plan->local_tokens, 4, 4}, DType::kF32);
  const Tensor k = ctx.Zeros({plan->local_tokens, 2, 4}, DType::kF32);
  EXPECT_THROW(RoutedContextForward(ctx, one, *plan, q, k, k), InvalidArgument);
  EXPECT_THROW(MakeRoutedPlan({.block_size = 100}, 2, p.documents, PlacementOf(c), {}, 0),
               InvalidArgument);
  RoutedCase other = c;
  other.moba.problem.documents =
      std::make_shared<const ops::Documents>(ops::Documents::OnePerRow(1, 400));
  EXPECT_THROW(MakeRoutedPlan({.block_size = 192}, 2, p.documents, PlacementOf(other), {}, 0),
               InvalidArgument);
  RunLocal(2, [&](Communicator& comm) {
    Context own;
    const Tensor few = own.Zeros({1, 4, 4}, DType::kF32);
    const auto mine = MakeRoutedPlan({.block_size = 192, .top_k = 2}, p.kv_heads, p.documents,
                                     PlacementOf(c), {}, comm.rank());
    EXPECT_THROW(RoutedContextForward(own, comm, *mine, few, few, few), InvalidArgument);
  });
}

}  // namespace
}  // namespace longspan::test
