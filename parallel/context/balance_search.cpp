#include "parallel/context/balance_search.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace longspan::parallel::internal {
namespace {

constexpr int kPartners = 8;  // lightest ranks that an exchange is first looked for with
constexpr int kMended = 3;    // placements made of each start by mending

// Blocks that stay together. Chunks of one group (row and size) can be exchanged.
struct Chunk {
  int64_t begin, blocks;  // global block ids
  int64_t work;
  size_t group;
  int32_t home;  // its rank in a contiguous placement
};

// A row of `base` blocks for each rank, and one more for some: they take turns from row to row.
struct Shares {
  explicit Shares(const BalanceProblem& p)
      : ranks(p.ranks), base(p.blocks_per_row / p.ranks), extra(p.blocks_per_row % p.ranks) {}
  int64_t Of(int64_t row, int64_t rank) const {
    const int64_t turn = (rank + ranks - row * extra % ranks) % ranks;
    return base + (turn < extra ? 1 : 0);
  }
  int64_t ranks, base, extra;
};

// The rows cut so that every rank has `pieces` chunks of each, of two sizes.
std::vector<Chunk> Cut(const BalanceProblem& p, const Shares& shares, int64_t pieces) {
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < p.rows; ++row) {
    int64_t at = row * p.blocks_per_row;
    for (int64_t rank = 0; rank < p.ranks; ++rank) {
      const int64_t share = shares.Of(row, rank);
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t blocks = share / pieces + (i < share % pieces ? 1 : 0);
        if (blocks == 0) continue;
        const bool large = blocks > shares.base / pieces;
        const auto first = p.work.begin() + at;
        chunks.push_back({at, blocks, std::accumulate(first, first + blocks, int64_t{0}),
                          static_cast<size_t>(2 * row + large), static_cast<int32_t>(rank)});
        at += blocks;
      }
    }
  }
  return chunks;
}

// Of indices of chunks.
struct HeavierFirst {
  const std::vector<Chunk>& chunks;
  bool operator()(size_t a, size_t b) const {
    return chunks[a].work != chunks[b].work ? chunks[a].work > chunks[b].work : a < b;
  }
};

// Chunks on ranks, with exchanges that keep how many of each group a rank has.
class Assignment {
 public:
  Assignment(const BalanceProblem& problem, const std::vector<Chunk>& chunks)
      : problem_(problem),
        chunks_(chunks),
        ranks_(static_cast<size_t>(problem.ranks)),
        rank_of_(chunks.size(), -1),
        load_(ranks_),
        held_(static_cast<size_t>(2 * problem.rows) * ranks_) {}

  // Each chunk on rank_of(index).
  template <class RankOf>
  void Start(const RankOf& rank_of) {
    for (size_t i = 0; i < chunks_.size(); ++i) Put(i, rank_of(i));
    for (std::vector<size_t>& list : held_)
      std::sort(list.begin(), list.end(), HeavierFirst{chunks_});
  }

  // The chunks by falling work, each to the rank that has least and still lacks one of its group.
  void DealByWork() {
    std::vector<int64_t> lacking(held_.size());
    for (const Chunk& c : chunks_) ++lacking[c.group * ranks_ + static_cast<size_t>(c.home)];
    std::vector<size_t> order(chunks_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), HeavierFirst{chunks_});
    for (const size_t i : order) {
      const int64_t* free = lacking.data() + chunks_[i].group * ranks_;
      size_t best = ranks_;
      for (size_t rank = 0; rank < ranks_; ++rank) {
        if (free[rank] > 0 && (best == ranks_ || load_[rank] < load_[best])) best = rank;
      }
      // Of equals the one that already has a neighbour.
      for (const size_t other : {i - 1, i + 1}) {
        const bool same_row =
            other < chunks_.size() && chunks_[other].group / 2 == chunks_[i].group / 2;
        if (!same_row || rank_of_[other] < 0) continue;
        const auto rank = static_cast<size_t>(rank_of_[other]);
        if (free[rank] > 0 && load_[rank] == load_[best]) best = rank;
      }
      --lacking[chunks_[i].group * ranks_ + best];
      Put(i, static_cast<int32_t>(best));
    }
  }

  // Exchanges chunks until no rank has more than `goal` or nothing helps.
  void Mend(int64_t goal) {
    for (size_t step = 0; step < 4 * chunks_.size(); ++step) {
      const auto from =
          static_cast<size_t>(std::max_element(load_.begin(), load_.end()) - load_.begin());
      if (load_[from] <= goal) return;
      const Exchange exchange = BestExchange(from);
      if (exchange.gain == 0) return;
      Apply(from, exchange);
    }
  }

  int64_t Largest() const { return *std::max_element(load_.begin(), load_.end()); }

  BalanceCandidate Candidate() const {
    std::vector<int32_t> number(ranks_, -1);
    int32_t next = 0;
    BalanceCandidate candidate{std::vector<int32_t>(problem_.work.size()), Largest(), 0};
    for (size_t i = 0; i < chunks_.size(); ++i) {
      int32_t& rank = number[static_cast<size_t>(rank_of_[i])];
      if (rank < 0) rank = next++;
      const auto first = candidate.owner.begin() + chunks_[i].begin;
      std::fill(first, first + chunks_[i].blocks, rank);
    }
    for (size_t b = 0; b < candidate.owner.size(); ++b) {
      const bool row_begins = static_cast<int64_t>(b) % problem_.blocks_per_row == 0;
      candidate.runs += row_begins || candidate.owner[b] != candidate.owner[b - 1];
    }
    return candidate;
  }

 private:
  struct Exchange {
    int64_t gain = 0;  // by how much the larger load of the two ranks falls
    size_t to = 0, give = 0, take = 0;
  };

  std::vector<size_t>& Held(size_t group, size_t rank) { return held_[group * ranks_ + rank]; }

  void Put(size_t chunk, int32_t rank) {
    rank_of_[chunk] = rank;
    load_[static_cast<size_t>(rank)] += chunks_[chunk].work;
    Held(chunks_[chunk].group, static_cast<size_t>(rank)).push_back(chunk);
  }

  Exchange BestExchange(size_t from) {
    std::vector<size_t> others(ranks_);
    std::iota(others.begin(), others.end(), size_t{0});
    const auto lighter = [&](size_t a, size_t b) {
      return load_[a] != load_[b] ? load_[a] < load_[b] : a < b;
    };
    const auto near = others.begin() + std::min<int64_t>(kPartners, problem_.ranks);
    std::partial_sort(others.begin(), near, others.end(), lighter);
    Exchange best;
    for (auto it = others.begin(); it != others.end(); ++it) {
      if (it == near && best.gain > 0) break;
      if (*it != from) Improve(from, *it, best);
    }
    return best;
  }

  // Replaces `best` by an exchange with `to` that gains more. A chunk that is heavier by d moves d
  // of work, which gains the smaller of d and gap - d: for every chunk given, the ones taken that
  // come next to half the gap from both sides.
  void Improve(size_t from, size_t to, Exchange& best) {
    const int64_t gap = load_[from] - load_[to];
    if (gap / 2 <= best.gain) return;
    for (size_t group = 0; group < held_.size() / ranks_; ++group) {
      const std::vector<size_t>&give = Held(group, from), &take = Held(group, to);
      size_t at = 0;
      for (const size_t given : give) {
        const int64_t target = chunks_[given].work - gap / 2;
        while (at < take.size() && chunks_[take[at]].work > target) ++at;
        for (const size_t near : {at - 1, at}) {
          if (near >= take.size()) continue;
          const int64_t moved = chunks_[given].work - chunks_[take[near]].work;
          const int64_t gain = std::min(moved, gap - moved);
          if (gain > best.gain) best = {gain, to, given, take[near]};
        }
      }
    }
  }

  void Apply(size_t from, const Exchange& e) {
    Move(e.give, from, e.to);
    Move(e.take, e.to, from);
  }
  void Move(size_t chunk, size_t from, size_t to) {
    const Chunk& c = chunks_[chunk];
    std::vector<size_t>&left = Held(c.group, from), &joined = Held(c.group, to);
    left.erase(std::lower_bound(left.begin(), left.end(), chunk, HeavierFirst{chunks_}));
    joined.insert(std::lower_bound(joined.begin(), joined.end(), chunk, HeavierFirst{chunks_}),
                  chunk);
    load_[from] -= c.work;
    load_[to] += c.work;
    rank_of_[chunk] = static_cast<int32_t>(to);
  }

  const BalanceProblem& problem_;
  const std::vector<Chunk>& chunks_;
  const size_t ranks_;
  std::vector<int32_t> rank_of_;           // [chunks]
  std::vector<int64_t> load_;              // [ranks]
  std::vector<std::vector<size_t>> held_;  // [groups, ranks]: chunks, the heaviest first
};

// Chunks a rank and row: 1, 2, 4, ... and last as many as it takes to make them single blocks.
std::vector<int64_t> PieceCounts(const BalanceProblem& p) {
  const int64_t most = (p.blocks_per_row + p.ranks - 1) / p.ranks;
  std::vector<int64_t> counts;
  for (int64_t m = 1; m < most; m *= 2) counts.push_back(m);
  counts.push_back(most);
  return counts;
}

// Contiguous or zigzag placements, as they are and mended.
void AddMended(const BalanceProblem& p, const Shares& shares, bool zigzag, int64_t limit,
               std::vector<BalanceCandidate>& candidates) {
  int found = 0;
  bool first = true;
  for (const int64_t pieces : PieceCounts(p)) {
    // A zigzag start needs two equal halves of every rank's share.
    if (zigzag && (pieces % 2 != 0 || shares.extra != 0 || shares.base % pieces != 0)) continue;
    const std::vector<Chunk> chunks = Cut(p, shares, pieces);
    Assignment a(p, chunks);
    a.Start([&](size_t i) {
      if (!zigzag) return chunks[i].home;
      const int64_t in_row = chunks[i].begin % p.blocks_per_row;
      const int64_t half = in_row / (shares.base / 2);
      return static_cast<int32_t>(std::min(half, 2 * p.ranks - 1 - half));
    });
    const bool as_it_is = std::exchange(first, false) && a.Largest() <= limit;
    if (!as_it_is) a.Mend(limit);
    if (a.Largest() > limit) continue;
    candidates.push_back(a.Candidate());
    if (as_it_is || ++found == kMended) return;
  }
}

}  // namespace

std::vector<BalanceCandidate> BalanceCandidates(const BalanceProblem& p) {
  const Shares shares(p);
  const int64_t total = std::accumulate(p.work.begin(), p.work.end(), int64_t{0});
  const int64_t mean = (total + p.ranks - 1) / p.ranks, enough = mean + mean / 1000;
  std::vector<BalanceCandidate> dealt, candidates;
  int64_t best = std::numeric_limits<int64_t>::max();
  for (const int64_t pieces : PieceCounts(p)) {
    const std::vector<Chunk> chunks = Cut(p, shares, pieces);
    Assignment a(p, chunks);
    a.DealByWork();
    a.Mend(enough);
    dealt.push_back(a.Candidate());
    best = std::min(best, a.Largest());
    if (best <= enough) break;  // smaller chunks would only make shorter runs
  }
  const int64_t limit = best + best / 100;
  AddMended(p, shares, /*zigzag=*/false, limit, candidates);
  AddMended(p, shares, /*zigzag=*/true, limit, candidates);
  for (BalanceCandidate& c : dealt) {
    if (c.largest <= limit) candidates.push_back(std::move(c));
  }
  std::stable_sort(
      candidates.begin(), candidates.end(),
      [](const BalanceCandidate& a, const BalanceCandidate& b) { return a.runs < b.runs; });
  return candidates;
}

}  // namespace longspan::parallel::internal
