#include "parallel/context/balance.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "ops/attention/block_rows.h"
#include "ops/core/check.h"
#include "parallel/context/balance_search.h"
#include "parallel/context/block_bits.h"

namespace longspan::parallel {
namespace {

using internal::BalanceCandidate;

constexpr size_t kCompared = 8;  // placements whose keys are counted, those with the longest runs

using Walks = std::vector<std::unique_ptr<ops::BlockRowWalk>>;  // one a layer

Walks MakeWalks(std::span<const BalanceLayer> layers, int64_t kv_heads,
                const std::shared_ptr<const ops::Documents>& documents) {
  Walks walks;
  for (const BalanceLayer& layer : layers) {
    LONGSPAN_CHECK(layer.layers >= 0) << "balance: a pattern with " << layer.layers << " layers";
    walks.push_back(std::make_unique<ops::BlockRowWalk>(layer.pattern, kv_heads, documents));
  }
  return walks;
}

std::vector<int64_t> WorkOf(std::span<const BalanceLayer> layers, const Walks& walks,
                            const ops::Documents& documents) {
  std::vector<int64_t> work(
      static_cast<size_t>(documents.rows * ops::BlocksPerRow(documents.row_length)));
  for (size_t i = 0; i < layers.size(); ++i) {
    const ops::BlockRowWalk& walk = *walks[i];
    for (int64_t h = 0; h < walk.patterns() && layers[i].layers > 0; ++h) {
      const int64_t weight = layers[i].layers * walk.heads_of(h);
      walk.ForEach(h, [&](int32_t block, std::span<const ops::BlockRun> runs) {
        int64_t pairs = 0;
        for (const ops::BlockRun& run : runs) pairs += walk.Pairs(h, block, run);
        work[static_cast<size_t>(block)] += weight * pairs;
      });
    }
  }
  return work;
}

// Blocks of keys that move to other ranks, over layers and kv heads, for each candidate.
std::vector<int64_t> MovedBlocks(std::span<const BalanceLayer> layers, const Walks& walks,
                                 std::span<const BalanceCandidate> candidates, int64_t ranks) {
  const auto blocks = static_cast<int64_t>(candidates.front().owner.size());
  std::vector<BlockBits> held, needed(candidates.size(), BlockBits(ranks, blocks));
  for (const BalanceCandidate& c : candidates) {
    BlockBits& bits = held.emplace_back(ranks, blocks);
    for (int64_t b = 0; b < blocks; ++b) bits.Add(c.owner[static_cast<size_t>(b)], b);
  }
  std::vector<int64_t> moved(candidates.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const ops::BlockRowWalk& walk = *walks[i];
    for (int64_t h = 0; h < walk.patterns() && layers[i].layers > 0; ++h) {
      for (BlockBits& bits : needed) bits.Clear();
      walk.ForEach(h, [&](int32_t block, std::span<const ops::BlockRun> runs) {
        for (size_t c = 0; c < candidates.size(); ++c) {
          const int32_t rank = candidates[c].owner[static_cast<size_t>(block)];
          for (const ops::BlockRun& run : runs) needed[c].Add(rank, run);
        }
      });
      for (size_t c = 0; c < candidates.size(); ++c) {
        int64_t missing = 0;
        for (int64_t rank = 0; rank < ranks; ++rank) {
          const std::span<const uint64_t> need = needed[c].Of(rank), own = held[c].Of(rank);
          for (size_t w = 0; w < need.size(); ++w) missing += std::popcount(need[w] & ~own[w]);
        }
        moved[c] += layers[i].layers * walk.heads_of(h) * missing;
      }
    }
  }
  return moved;
}

std::vector<BalanceCandidate> CandidatesFor(int64_t rows, int64_t row_length, int64_t ranks,
                                            std::span<const int64_t> work) {
  const int64_t per_row = ops::BlocksPerRow(row_length);
  LONGSPAN_CHECK(rows >= 0 && static_cast<int64_t>(work.size()) == rows * per_row)
      << "balance: work of " << work.size() << " blocks for " << rows << " rows of " << per_row;
  for (const int64_t w : work) LONGSPAN_CHECK(w >= 0) << "balance: work " << w << " of a block";
  return internal::BalanceCandidates({rows, per_row, ranks, work});
}

void CheckRanks(int64_t ranks) {
  LONGSPAN_CHECK(ranks >= 1) << "balance: " << ranks << " ranks; it must be at least 1";
}

}  // namespace

std::vector<int64_t> BlockRowWork(std::span<const BalanceLayer> layers, int64_t kv_heads,
                                  const std::shared_ptr<const ops::Documents>& documents) {
  LONGSPAN_CHECK(documents != nullptr) << "BlockRowWork: documents are missing";
  return WorkOf(layers, MakeWalks(layers, kv_heads, documents), *documents);
}

Placement Placement::Balanced(int64_t rows, int64_t row_length, int64_t ranks,
                              std::span<const int64_t> work) {
  CheckRanks(ranks);
  LONGSPAN_CHECK(row_length >= 1) << "balance: rows of " << row_length << " tokens";
  const auto candidates = CandidatesFor(rows, row_length, ranks, work);
  return FromOwners(rows, row_length, ranks, candidates.front().owner);
}

Placement BalancedPlacement(std::span<const BalanceLayer> layers, int64_t kv_heads,
                            const std::shared_ptr<const ops::Documents>& documents, int64_t ranks) {
  LONGSPAN_CHECK(documents != nullptr) << "BalancedPlacement: documents are missing";
  CheckRanks(ranks);
  const Walks walks = MakeWalks(layers, kv_heads, documents);
  std::vector<BalanceCandidate> candidates = CandidatesFor(
      documents->rows, documents->row_length, ranks, WorkOf(layers, walks, *documents));
  if (candidates.size() > kCompared) candidates.resize(kCompared);
  size_t best = 0;
  if (candidates.size() > 1) {
    const std::vector<int64_t> moved = MovedBlocks(layers, walks, candidates, ranks);
    best = static_cast<size_t>(std::min_element(moved.begin(), moved.end()) - moved.begin());
  }
  return Placement::FromOwners(documents->rows, documents->row_length, ranks,
                               candidates[best].owner);
}

BalanceFigures MeasureBalance(const Placement& placement, std::span<const int64_t> work) {
  const int64_t per_row = ops::BlocksPerRow(placement.row_length()), ranks = placement.ranks();
  LONGSPAN_CHECK(work.size() == placement.owners().size())
      << "balance: work of " << work.size() << " blocks for " << placement.owners().size();
  BalanceFigures figures;
  if (work.empty()) return figures;
  std::vector<int64_t> load(static_cast<size_t>(ranks));
  for (size_t b = 0; b < work.size(); ++b) {
    load[static_cast<size_t>(placement.owner(static_cast<int64_t>(b)))] += work[b];
  }
  figures.largest = *std::max_element(load.begin(), load.end());
  figures.mean = (std::accumulate(work.begin(), work.end(), int64_t{0}) + ranks - 1) / ranks;
  // The heaviest block with the lightest others of its row and of all other rows.
  const auto heaviest = std::max_element(work.begin(), work.end());
  int64_t filled = *heaviest;
  for (int64_t row = 0; row < placement.rows(); ++row) {
    const auto first = work.begin() + row * per_row;
    std::vector<int64_t> others(first, first + per_row);
    int64_t more = per_row / ranks;
    if (heaviest >= first && heaviest < first + per_row) {
      others.erase(others.begin() + (heaviest - first));
      more = std::max<int64_t>(more - 1, 0);
    }
    std::sort(others.begin(), others.end());
    filled += std::accumulate(others.begin(), others.begin() + more, int64_t{0});
  }
  figures.floor = std::max(figures.mean, filled);
  return figures;
}

}  // namespace longspan::parallel
