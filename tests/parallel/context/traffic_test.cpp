// What strategies send, against counts of what queries see, token by token from Visible(): neither
// masks nor plans take part in them. And programs as such: who reads and writes what, when.
#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <functional>
#include <map>
#include <set>

#include "parallel/context/builder.h"
#include "tests/parallel/context/program_check.h"
#include "tests/parallel/context/strategy_cases.h"

namespace longspan::test {
namespace {

using namespace parallel;

constexpr PlacementKind kPlacements[] = {PlacementKind::kContiguous, PlacementKind::kZigzag,
                                         PlacementKind::kStriped, PlacementKind::kBalanced};

// Which (kv head, block) the queries of each rank see.
class SeenBlocks {
 public:
  explicit SeenBlocks(const StrategyCase& c)
      : case_(c), placement_(*PlacementOf(c)), blocks_(ops::BlocksPerRow(c.row_length)) {
    const auto documents = DocumentsOf(c);
    const ops::VisibleRule rule = ops::MakeVisibleRule(c.pattern, c.kv_heads, *documents);
    seen_.resize(static_cast<size_t>(c.ranks * c.kv_heads) * All());
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      for (int64_t q = 0; q < c.tokens(); ++q) {
        const int64_t row = q / c.row_length * c.row_length;
        for (int64_t k = row; k < row + c.row_length; ++k) {
          if (ops::Visible(rule, h, q, k))
            seen_[At(placement_.owner(BlockOf(q)), h, BlockOf(k))] = true;
        }
      }
    }
  }
  // Rows that the ranks [begin, end) see of `owner`, each counted once.
  int64_t Rows(int begin, int end, int owner) const {
    int64_t rows = 0;
    for (int64_t h = 0; h < case_.kv_heads; ++h) {
      for (int64_t b = 0; b < static_cast<int64_t>(All()); ++b) {
        if (placement_.owner(b) != owner) continue;
        bool any = false;
        for (int r = begin; r < end; ++r) any = any || seen_[At(r, h, b)];
        const int64_t first = b % blocks_ * 64;
        if (any) rows += std::min<int64_t>(64, case_.row_length - first);
      }
    }
    return rows;
  }
  int64_t Rows(int rank, int owner) const { return Rows(rank, rank + 1, owner); }

 private:
  size_t All() const { return case_.ends.size() * static_cast<size_t>(blocks_); }
  int64_t BlockOf(int64_t token) const {
    return token / case_.row_length * blocks_ + token % case_.row_length / 64;
  }
  size_t At(int64_t rank, int64_t head, int64_t block) const {
    return static_cast<size_t>(rank * case_.kv_heads + head) * All() + static_cast<size_t>(block);
  }

  const StrategyCase& case_;
  const Placement placement_;
  const int64_t blocks_;
  std::vector<bool> seen_;
};

constexpr int64_t kKeyRow = 2 * kDim * 2, kGradRow = 2 * kDim * 4;  // bytes in bf16 and f32

StrategyCase TrafficCase(const std::string& name, const ops::AttentionPattern& pattern) {
  StrategyCase c{name, pattern, {{10, 70, 71, 348, 690}}, 690};
  c.strategy.kind = StrategyKind::kExchange;
  c.dtype = DType::kBF16;
  return c;
}

// Every rank gets from every other exactly the rows that its queries see, once; gradients of what
// it has given come back once.
TEST(TrafficTest, ExchangeMovesWhatQueriesSeeAndNothingElse) {
  size_t turn = 0;
  for (const auto& [name, pattern] : Patterns()) {
    StrategyCase c = TrafficCase(name, pattern);
    c.placement = kPlacements[turn % 4];
    c.ranks = turn % 3 == 0 ? 3 : 5;
    for (const bool keep : {false, true}) {
      c.strategy.keep_rows = keep ? int64_t{1} << 40 : 0;
      SCOPED_TRACE(c.Describe());
      const SeenBlocks seen(c);
      const Outcome got = RunCase(c, Inputs(c, DType::kBF16));
      for (int r = 0; r < c.ranks; ++r) {
        for (int peer = 0; peer < c.ranks; ++peer) {
          if (peer == r) continue;
          const int64_t keys = seen.Rows(r, peer) * kKeyRow;
          const int64_t grads = seen.Rows(peer, r) * kGradRow;
          const auto at = [&](const Arrivals& a) {
            return a[static_cast<size_t>(r)][static_cast<size_t>(peer)];
          };
          EXPECT_EQ(at(got.forward), keys) << peer << " to " << r;
          EXPECT_EQ(at(got.backward), grads + (keep ? 0 : keys)) << peer << " to " << r;
        }
      }
    }
    ++turn;
  }
}

// With nodes, what several ranks of a node see crosses to it once, and so do its gradients; in all,
// every rank gets what it sees once.
TEST(TrafficTest, WhatANodeSeesCrossesToItOnce) {
  size_t turn = 0;
  for (const auto& [name, pattern] : Patterns()) {
    StrategyCase c = TrafficCase(name, pattern);
    c.placement = kPlacements[turn % 4];
    c.ranks = turn % 2 == 0 ? 8 : 5;
    const int size = c.strategy.ranks_per_node = turn % 3 == 0 ? 4 : 2;  // also half-full nodes
    for (const bool keep : {false, true}) {
      c.strategy.keep_rows = keep ? int64_t{1} << 40 : 0;
      SCOPED_TRACE(c.Describe());
      const SeenBlocks seen(c);
      const Outcome got = RunCase(c, Inputs(c, DType::kBF16));
      for (int node = 0; node * size < c.ranks; ++node) {
        const int begin = node * size, end = std::min(c.ranks, begin + size);
        int64_t keys = 0, grads = 0, forward = 0, backward = 0;
        for (int peer = 0; peer < c.ranks; ++peer) {
          if (peer / size == node) continue;
          keys += seen.Rows(begin, end, peer);
          for (int other = 0; other * size < c.ranks; ++other) {
            const int other_begin = other * size;
            if (other != node && peer == other_begin) {
              for (int owner = begin; owner < end; ++owner) {
                grads += seen.Rows(other_begin, std::min(c.ranks, other_begin + size), owner);
              }
            }
          }
          for (int r = begin; r < end; ++r) {
            forward += got.forward[static_cast<size_t>(r)][static_cast<size_t>(peer)];
            backward += got.backward[static_cast<size_t>(r)][static_cast<size_t>(peer)];
          }
        }
        EXPECT_EQ(forward, keys * kKeyRow) << "to node " << node;
        EXPECT_EQ(backward, grads * kGradRow + (keep ? 0 : keys * kKeyRow)) << "to node " << node;
      }
      for (int r = 0; r < c.ranks; ++r) {
        int64_t rows = 0, arrived = 0;
        for (int peer = 0; peer < c.ranks; ++peer) {
          if (peer == r) continue;
          rows += seen.Rows(r, peer);
          arrived += got.forward[static_cast<size_t>(r)][static_cast<size_t>(peer)];
        }
        EXPECT_EQ(arrived, rows * kKeyRow) << "to rank " << r;
      }
    }
    ++turn;
  }
}

// Who gets what crosses is spread over the ranks of a node, also where only every eighth block
// does.
TEST(TrafficTest, RanksOfANodeShareWhatCrosses) {
  for (const int64_t stride : {1, 8}) {
    StrategyCase c{
        "s2", ops::AttentionPattern::S2({.local_blocks = 1, .stride_blocks = stride}), {{}}};
    c.row_length = 65536, c.ends = {{65536}}, c.kv_heads = c.heads = 8, c.ranks = 8;
    c.placement = PlacementKind::kZigzag;
    const StrategyOptions options{.kind = StrategyKind::kExchange, .ranks_per_node = 4};
    const ProgramBuilder builder(*DemandOf(c), options);
    int64_t least = INT64_MAX, most = 0;
    for (int r = 0; r < 4; ++r) {
      const Program program = builder.Build(r, /*with_masks=*/false).forward;
      int64_t crossing = 0;
      for (const Transfer& t : program.transfers) {
        for (const Message& m : t.recvs) crossing += m.peer >= 4 ? m.span.rows() : 0;
      }
      least = std::min(least, crossing), most = std::max(most, crossing);
    }
    EXPECT_LT(static_cast<double>(most), 1.35 * static_cast<double>(least)) << stride;
  }
}

// Rows that the ranks receive in the forward pass of an exchange.
std::vector<int64_t> ReceivedRows(const StrategyCase& c) {
  const ProgramBuilder builder(*DemandOf(c), StrategyOf(StrategyKind::kExchange));
  std::vector<int64_t> rows;
  for (int r = 0; r < c.ranks; ++r) {
    rows.push_back(builder.Build(r, /*with_masks=*/false).forward.ReceivedRows(Arena::kWork));
  }
  return rows;
}

TEST(TrafficTest, S2MovesAFewPercentOfADenseRing) {
  StrategyCase c{
      "s2", ops::AttentionPattern::S2({.local_blocks = 16, .stride_blocks = 8}), {{131072}}};
  c.row_length = 131072, c.heads = 16, c.kv_heads = 8, c.ranks = 8;
  c.placement = PlacementKind::kZigzag;
  const double ring = 7.0 / 8 * 131072 * 8;  // rows that a rank of a dense ring receives
  double total = 0, worst = 0;
  for (const int64_t rows : ReceivedRows(c)) {
    total += static_cast<double>(rows);
    worst = std::max(worst, static_cast<double>(rows));
  }
  std::printf("S2 on 8 ranks: %.2f %% of a dense ring, the worst rank %.2f %%\n",
              100 * total / (8 * ring), 100 * worst / ring);
  EXPECT_LE(total, 0.11 * 8 * ring);
  EXPECT_LE(worst, 0.135 * ring);
}

TEST(TrafficTest, WindowsMoveAHaloWhateverTheLengthAndTheRanks) {
  for (const int ranks : {4, 8, 16}) {
    for (const int64_t tokens : {131072, 262144}) {
      StrategyCase c{"window", ops::AttentionPattern::Window(4096), {{tokens}}, tokens};
      c.ranks = ranks;
      std::vector<int64_t> halo(static_cast<size_t>(ranks), 4096 * c.kv_heads);
      halo[0] = 0;
      EXPECT_EQ(ReceivedRows(c), halo) << ranks << " ranks, " << tokens << " tokens";
    }
  }
}

TEST(TrafficTest, DocumentsMoveOnlyAcrossTheEdgesTheyCross) {
  StrategyCase c{
      "causal", ops::AttentionPattern::Causal(), {{100, 256, 320, 512, 768, 1024}}, 1024};
  c.ranks = 4;
  EXPECT_EQ(ReceivedRows(c), (std::vector<int64_t>{0, 0, 0, 0}));
  c.ends = {{100, 300, 512, 700, 1024}};  // [100, 300) crosses 256, [700, 1024) crosses 768
  const int64_t heads = c.kv_heads;
  EXPECT_EQ(ReceivedRows(c), (std::vector<int64_t>{0, 192 * heads, 0, 128 * heads}));
}

// ---- programs as such --------------------------------------------------------------------------

std::vector<StrategyOptions> ProgramOptions() {
  constexpr int64_t kAll = int64_t{1} << 40;
  std::vector<StrategyOptions> options = {
      {.kind = StrategyKind::kRing},
      {.kind = StrategyKind::kAllGather},
      {.kind = StrategyKind::kAllGather, .head_groups = 1},
      {.kind = StrategyKind::kExchange},
      {.kind = StrategyKind::kExchange, .stages = 4, .keep_rows = kAll},
      {.kind = StrategyKind::kExchange, .stages = 3, .keep_rows = 600},
  };
  for (const int nodes : {1, 2, 3, 4, 6, 12}) {
    options.push_back({.kind = StrategyKind::kDoubleRing, .ranks_per_node = nodes});
  }
  for (const int nodes : {2, 4, 5}) {
    options.push_back({.kind = StrategyKind::kExchange, .ranks_per_node = nodes, .stages = 3});
    options.push_back({.kind = StrategyKind::kExchange, .ranks_per_node = nodes, .keep_rows = 600});
    options.push_back(
        {.kind = StrategyKind::kExchange, .ranks_per_node = nodes, .keep_rows = kAll});
  }
  return options;
}

TEST(ProgramTest, RanksAgreeAndNoRowIsTouchedInFlightOrReadBeforeItIsWritten) {
  size_t turn = 0;
  for (const StrategyOptions& options : ProgramOptions()) {
    for (const auto& [name, pattern] : Patterns()) {
      if (turn++ % 3 != 0) continue;
      StrategyCase c{name, pattern, {{100, 1000}, {1000}}, 1000};
      c.placement = kPlacements[turn / 3 % 4];
      c.ranks = 12;
      c.strategy = options;
      SCOPED_TRACE(c.Describe());
      const auto demand = DemandOf(c);
      const ProgramBuilder builder(*demand, options);
      std::vector<Program> forward, backward;
      for (int r = 0; r < c.ranks; ++r) {
        Programs programs = builder.Build(r);
        const Programs outline = builder.Build(r, /*with_masks=*/false);
        CheckSameOutline(programs.forward, outline.forward);
        CheckSameOutline(programs.backward, outline.backward);
        std::vector<bool> kept;
        CheckProgram(programs.forward, c.row_length, kept);
        EXPECT_EQ(programs.forward.kept_rows, programs.backward.kept_rows);
        CheckProgram(programs.backward, c.row_length, kept);
        EXPECT_EQ(programs.forward.VisiblePairs(), demand->TotalPairs(r));
        EXPECT_EQ(programs.backward.VisiblePairs(), demand->TotalPairs(r));
        forward.push_back(std::move(programs.forward));
        backward.push_back(std::move(programs.backward));
      }
      CheckTransfersMatch(forward);
      CheckTransfersMatch(backward);
    }
  }
}

// Steps of a program that compute while no transfer is in flight.
std::vector<size_t> StepsWithoutCompany(const Program& program) {
  std::vector<size_t> alone;
  int flying = 0;
  size_t step = 0;
  for (const Instruction& i : program.instructions) {
    if (i.op == Instruction::Op::kPost) ++flying;
    if (i.op == Instruction::Op::kWait) --flying;
    if (i.op != Instruction::Op::kCompute) continue;
    if (flying == 0) alone.push_back(step);
    ++step;
  }
  return alone;
}

TEST(ProgramTest, TransfersHideBehindEveryStepButTheLastForwardAndAllOfThemBackward) {
  StrategyCase c{"full", ops::AttentionPattern::Full(), {{4096}}, 4096};
  c.ranks = 8;
  for (const StrategyOptions& options :
       {StrategyOptions{.kind = StrategyKind::kRing},
        StrategyOptions{.kind = StrategyKind::kDoubleRing, .ranks_per_node = 1},
        StrategyOptions{.kind = StrategyKind::kDoubleRing, .ranks_per_node = 4},
        StrategyOptions{.kind = StrategyKind::kAllGather, .head_groups = 2},
        StrategyOptions{.kind = StrategyKind::kExchange},
        StrategyOptions{.kind = StrategyKind::kExchange, .stages = 3},
        StrategyOptions{.kind = StrategyKind::kExchange, .keep_rows = 1 << 30},
        StrategyOptions{.kind = StrategyKind::kExchange, .ranks_per_node = 4}}) {
    c.strategy = options;
    SCOPED_TRACE(c.Describe());
    const Programs programs = ProgramBuilder(*DemandOf(c), options).Build(3);
    EXPECT_EQ(StepsWithoutCompany(programs.forward),
              (std::vector<size_t>{programs.forward.computes.size() - 1}));
    const std::vector<size_t> none;
    // Kept keys need no fetch, so nothing is there to travel before the first sums.
    const std::vector<size_t> first = {0};
    EXPECT_EQ(StepsWithoutCompany(programs.backward), options.keep_rows > 0 ? first : none);
  }
}

// Rows that arrive with each transfer of keys.
std::vector<int64_t> RowsByTransfer(const Program& program) {
  std::vector<int64_t> rows;
  for (const Transfer& t : program.transfers) {
    rows.push_back(0);
    for (const Message& m : t.recvs) rows.back() += m.span.rows();
  }
  return rows;
}

TEST(ProgramTest, GroupsOfAnExchangeAreAboutEvenAndTheFirstIsNotEmpty) {
  for (const auto& [name, pattern] : Patterns()) {
    for (const PlacementKind placement : kPlacements) {
      for (const int stages : {1, 2, 3}) {
        StrategyCase c{name, pattern, {{2048}}, 2048, placement};
        c.ranks = 8;
        c.strategy = {.kind = StrategyKind::kExchange, .stages = stages};
        SCOPED_TRACE(c.Describe());
        const auto demand = DemandOf(c);
        const ProgramBuilder builder(*demand, c.strategy);
        for (int r = 0; r < c.ranks; ++r) {
          const auto rows = RowsByTransfer(builder.Build(r, /*with_masks=*/false).forward);
          const int64_t total = demand->LowerBoundRows(r);
          if (total == 0) continue;
          int64_t largest_owner = 0, sum = 0;
          for (int owner = 0; owner < c.ranks; ++owner) {
            int64_t owned = 0;
            for (int64_t p = 0; owner != r && p < demand->patterns(); ++p) {
              const auto blocks = demand->NeededFrom(r, owner, p).size();
              owned += demand->heads_of(p) * 64 * static_cast<int64_t>(blocks);
            }
            largest_owner = std::max(largest_owner, owned);
          }
          for (const int64_t n : rows) {
            sum += n;
            EXPECT_LE(n, total / stages + largest_owner) << "rank " << r;
          }
          EXPECT_EQ(sum, total) << "rank " << r;
          EXPECT_GT(rows.at(0), 0) << "rank " << r;
          EXPECT_LE(rows.size(), static_cast<size_t>(stages));
        }
      }
    }
  }
}

// The first ranks behind a rank are in its first group, so that no two ranks begin with the same.
TEST(ProgramTest, GroupsOfAnExchangeFollowTheRing) {
  StrategyCase c{"full", ops::AttentionPattern::Full(), {{1024}}, 1024};
  c.ranks = 8;
  const auto senders = [&](int rank, int ranks_per_node, size_t transfer) {
    const StrategyOptions options{.kind = StrategyKind::kExchange,
                                  .ranks_per_node = ranks_per_node};
    const Program program = ProgramBuilder(*DemandOf(c), options).Build(rank, false).forward;
    std::set<int> peers;
    for (const Message& m : program.transfers.at(transfer).recvs) peers.insert(m.peer);
    return peers;
  };
  EXPECT_EQ(senders(6, 0, 0), (std::set<int>{7, 0, 1, 2}));
  EXPECT_EQ(senders(6, 0, 1), (std::set<int>{3, 4, 5}));
  // Of nodes it is the ranks behind the node; neighbours' keys come with the first group.
  EXPECT_EQ(senders(2, 2, 0), (std::set<int>{3, 4, 5, 6}));
}

// A rank keeps what it receives when that is within the budget, the ranks of a node together.
TEST(ProgramTest, KeysAreKeptWhereAllOfThemFit) {
  StrategyCase c{"causal", ops::AttentionPattern::Causal(), {{1000}}, 1000};
  c.ranks = 5;
  const auto demand = DemandOf(c);
  for (const int size : {1, 2}) {
    for (int rank = 0; rank < c.ranks; ++rank) {
      SCOPED_TRACE(Str("rank ", rank, ", nodes of ", size));
      const int64_t received = demand->LowerBoundRows(rank);
      int64_t most = 0;
      for (int r = rank / size * size; r < std::min(c.ranks, rank / size * size + size); ++r) {
        most = std::max(most, demand->LowerBoundRows(r));
      }
      for (const int64_t budget : {most, most - 1}) {
        if (budget < 0) continue;
        const bool keeps = budget == most;
        const Programs programs = ProgramBuilder(*demand, {.kind = StrategyKind::kExchange,
                                                           .ranks_per_node = size,
                                                           .keep_rows = budget})
                                      .Build(rank, /*with_masks=*/false);
        EXPECT_EQ(programs.forward.kept_rows, keeps ? received : 0);
        EXPECT_EQ(programs.backward.ReceivedRows(Arena::kWork), keeps ? 0 : received);
      }
    }
  }
}

// Which ranks the gradients of each piece come from, in the order in which a program adds them: to
// keys at home and, of exchange with nodes, to the share of a rank that has passed keys on.
class SumOrder {
 public:
  SumOrder(const Program& program, int rank)
      : program_(program), from_(static_cast<size_t>(program.grad_rows), -1) {
    for (const Instruction& i : program.instructions) {
      const auto index = static_cast<size_t>(i.index);
      if (i.op == Instruction::Op::kZero) Mark(program.spans[index], rank);
      if (i.op == Instruction::Op::kPost) {
        for (const Message& m : program.transfers[index].recvs) {
          if (m.span.arena == Arena::kGrad) Mark(m.span, m.peer);
        }
      }
      if (i.op == Instruction::Op::kAddHome) AddHome(program.packs[index]);
      if (i.op == Instruction::Op::kAddRows) AddRows(program.moves[index], rank);
    }
  }
  int largest() const { return largest_; }  // number of shares added up by one instruction

 private:
  void Mark(const RowSpan& span, int rank) {
    std::fill(from_.begin() + span.begin, from_.begin() + span.end, rank);
  }
  int From(int64_t row) const { return from_[static_cast<size_t>(row)]; }
  void ExpectAscending(const std::vector<int>& ranks) {
    EXPECT_TRUE(std::ranges::is_sorted(ranks, std::less_equal<>()))
        << ::testing::PrintToString(ranks);
    largest_ = std::max(largest_, static_cast<int>(ranks.size()));
  }
  void AddHome(const PieceList& list) {
    std::map<std::pair<int32_t, int32_t>, std::vector<int>> sources;
    for (const Piece& p : list.pieces) sources[{p.kv_head, p.block}].push_back(From(p.row));
    for (const auto& [piece, ranks] : sources) ExpectAscending(ranks);
  }
  void AddRows(const RowMoves& list, int rank) {
    std::map<int64_t, std::vector<int>> sources;
    for (const RowMove& m : list.moves) {
      EXPECT_EQ(From(m.to), rank) << "its own share comes first";
      sources[m.to].push_back(From(m.from));
    }
    for (const auto& [row, ranks] : sources) ExpectAscending(ranks);
  }

  const Program& program_;
  std::vector<int> from_;  // [row of kGrad] the rank whose gradients are there
  int largest_ = 0;
};

TEST(ProgramTest, GradientsAddUpInAscendingRank) {
  for (const StrategyOptions& options :
       {StrategyOptions{.kind = StrategyKind::kAllGather},
        StrategyOptions{.kind = StrategyKind::kExchange, .stages = 1},
        StrategyOptions{.kind = StrategyKind::kExchange, .ranks_per_node = 4},
        StrategyOptions{.kind = StrategyKind::kExchange, .ranks_per_node = 2, .stages = 1}}) {
    StrategyCase c{"full", ops::AttentionPattern::Full(), {{1000}}, 1000};
    c.ranks = 8;
    c.strategy = options;
    SCOPED_TRACE(c.Describe());
    const ProgramBuilder builder(*DemandOf(c), options);
    int largest = 0;
    for (int r = 0; r < c.ranks; ++r) {
      const SumOrder order(builder.Build(r).backward, r);
      largest = std::max(largest, order.largest());
    }
    EXPECT_GE(largest, 3);
  }
}

// The memory that a rank takes for a pass does not grow with the number of stages of a ring.
TEST(ProgramTest, RingsTakeTwoShardsOfKeysAndThreeOfGradients) {
  for (const int ranks : {4, 16}) {
    StrategyCase c{"full", ops::AttentionPattern::Full(), {{4096}}, 4096};
    c.ranks = ranks;
    const int64_t shard = 4096 / ranks * c.kv_heads;
    const Programs programs =
        ProgramBuilder(*DemandOf(c), StrategyOf(StrategyKind::kRing)).Build(1);
    EXPECT_EQ(programs.forward.work_rows, 2 * shard);
    EXPECT_EQ(programs.forward.kept_rows, shard);
    EXPECT_EQ(programs.backward.work_rows, 2 * shard);
    EXPECT_EQ(programs.backward.grad_rows, 3 * shard);
  }
}

// Nor with the number of stages of an exchange: a group that computes and one in flight, and what
// others get of this rank's keys in the same two transfers. All_gather takes its own keys and two
// groups of heads of the row, and gradients of two groups for all and from all.
TEST(ProgramTest, BuffersAreThoseOfTwoGroups) {
  for (const int ranks : {4, 16}) {
    StrategyCase c{"full", ops::AttentionPattern::Full(), {{4096}}, 4096};
    c.ranks = ranks, c.heads = c.kv_heads = 4;
    const int64_t shard = 4096 / ranks * c.kv_heads, group = 4096;  // one of the four heads
    const auto build = [&](const StrategyOptions& options) {
      return ProgramBuilder(*DemandOf(c), options).Build(1);
    };
    const Programs exchange = build({.kind = StrategyKind::kExchange, .stages = ranks - 1});
    EXPECT_EQ(exchange.forward.transfers.size(), static_cast<size_t>(ranks - 1));
    EXPECT_LE(exchange.forward.work_rows, 4 * shard);
    EXPECT_LE(exchange.backward.work_rows, 4 * shard);
    EXPECT_LE(exchange.backward.grad_rows, 4 * shard);
    const Programs gather = build({.kind = StrategyKind::kAllGather, .head_groups = 4});
    EXPECT_LE(gather.forward.work_rows, shard + 2 * group);
    EXPECT_LE(gather.backward.work_rows, shard + 2 * group);
    EXPECT_LE(gather.backward.grad_rows, 4 * group);
  }
}

// Half of a rank's own keys hides the first transfer of a backward pass, the other half the last.
TEST(ProgramTest, OwnKeysAreSplitInEqualParts) {
  StrategyCase c{"causal", ops::AttentionPattern::Causal(), {{8192}}, 8192};
  c.placement = PlacementKind::kZigzag, c.ranks = 4;
  const Program program =
      ProgramBuilder(*DemandOf(c), StrategyOf(StrategyKind::kExchange)).Build(1).backward;
  const ComputeStep &first = program.computes.front(), &last = program.computes.back();
  ASSERT_TRUE(first.own && last.own && program.computes.size() > 2);
  EXPECT_NEAR(static_cast<double>(first.pairs), static_cast<double>(last.pairs),
              0.2 * static_cast<double>(last.pairs));
}

#ifdef NDEBUG
constexpr double kSecondsPerPattern = 1;
#else
constexpr double kSecondsPerPattern = 20;
#endif
TEST(ProgramTest, AMillionTokensOn1024RanksArePlannedInASecondAPattern) {
  const std::vector<std::pair<std::string, ops::AttentionPattern>> patterns = {
      {"causal", ops::AttentionPattern::Causal()},
      {"window 4096", ops::AttentionPattern::Window(4096)},
      {"S2, 8 patterns", ops::AttentionPattern::S2({.local_blocks = 16, .stride_blocks = 8})}};
  for (const auto& [name, pattern] : patterns) {
    StrategyCase c{name, pattern, {{int64_t{1} << 20}}, int64_t{1} << 20};
    c.heads = 16, c.kv_heads = 8, c.ranks = 1024;
    c.placement = PlacementKind::kZigzag;
    const auto documents = DocumentsOf(c);
    const auto placement = PlacementOf(c);
    for (const StrategyOptions& options :
         {StrategyOptions{.kind = StrategyKind::kRing},
          StrategyOptions{.kind = StrategyKind::kAllGather},
          StrategyOptions{.kind = StrategyKind::kExchange},
          StrategyOptions{.kind = StrategyKind::kExchange, .ranks_per_node = 8}}) {
      const std::clock_t start = std::clock();
      const auto demand = ContextDemand::Build(pattern, c.kv_heads, documents, placement);
      const Programs programs = ProgramBuilder(*demand, options).Build(/*rank=*/300);
      const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
      std::printf("%-15s %-11s nodes of %d: %.3f s\n", name.c_str(), ToString(options.kind),
                  options.ranks_per_node, seconds);
      EXPECT_GT(programs.forward.VisiblePairs(), 0);
      EXPECT_LT(seconds, kSecondsPerPattern * static_cast<double>(demand->patterns()));
    }
  }
}

}  // namespace
}  // namespace longspan::test
