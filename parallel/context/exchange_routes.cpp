#include "parallel/context/exchange_routes.h"

#include <algorithm>

namespace longspan::parallel::internal {
namespace {

constexpr int kDefaultStages = 2;

int UnitRanks(const StrategyOptions& options, int ranks) {
  const bool nodes = options.ranks_per_node > 1 && options.ranks_per_node < ranks;
  return options.deduplicate && nodes ? options.ranks_per_node : 1;
}

// Well mixed, so that the blocks of any stride are spread over the ranks that share them.
uint64_t Mix(uint64_t x) {
  x = (x ^ x >> 31) * 0x7fb5d329728ea185u;
  x = (x ^ x >> 27) * 0x81dadef4bc2dd44du;
  return x ^ x >> 33;
}

}  // namespace

ExchangeRoutes::ExchangeRoutes(const ContextDemand& demand, const StrategyOptions& options)
    : ranks_(static_cast<int>(demand.ranks())), unit_ranks_(UnitRanks(options, ranks_)) {
  const int units = (ranks_ + unit_ranks_ - 1) / unit_ranks_;
  group_.resize(static_cast<size_t>(units) * static_cast<size_t>(ranks_));
  keeps_.resize(static_cast<size_t>(ranks_));
  std::vector<int64_t> distinct(static_cast<size_t>(ranks_));  // [owner], rows that a unit needs
  std::vector<int64_t> received(static_cast<size_t>(ranks_));  // [rank]
  for (int unit = 0; unit < units; ++unit) {
    Count(demand, unit, distinct, received);
    DealGroups(unit, options.stages > 0 ? options.stages : kDefaultStages, distinct);
    const int begin = unit * unit_ranks_, end = unit_end(begin);
    const int64_t most = *std::max_element(received.begin() + begin, received.begin() + end);
    const bool keeps = most <= options.keep_rows;
    std::fill(keeps_.begin() + begin, keeps_.begin() + end, static_cast<uint8_t>(keeps));
    all_keep_ = all_keep_ && keeps;
  }
}

void ExchangeRoutes::Count(const ContextDemand& demand, int unit, std::vector<int64_t>& distinct,
                           std::vector<int64_t>& received) {
  std::fill(distinct.begin(), distinct.end(), 0);
  const int begin = unit * unit_ranks_, end = unit_end(begin);
  const Placement& placement = demand.placement();
  for (int64_t p = 0; p < demand.patterns(); ++p) {
    const int64_t heads = demand.heads_of(p);
    if (heads == 0) continue;
    for (int32_t block = 0; block < demand.blocks(); ++block) {
      const int owner = placement.owner(block);
      int needing = 0;
      const int64_t rows = heads * ops::BlockTokens(placement.row_length(), block);
      for (int rank = begin; rank < end; ++rank) {
        if (rank == owner || !demand.Needs(rank, p, block)) continue;
        ++needing;
        received[static_cast<size_t>(rank)] += rows;
      }
      if (needing == 0) continue;
      if (unit_of(owner) == unit) {
        neighbours_ = true;
      } else {
        distinct[static_cast<size_t>(owner)] += rows;
        forwards_ = forwards_ || needing > 1;
      }
    }
  }
}

// The owners behind the unit, in the order of the ring, cut into stages of about equally many rows.
void ExchangeRoutes::DealGroups(int unit, int stages, const std::vector<int64_t>& rows) {
  int64_t total = 0, before = 0;
  for (const int64_t n : rows) total += n;
  if (total == 0) return;
  const int begin = unit * unit_ranks_, end = unit_end(begin);
  for (int i = 0; i < ranks_; ++i) {
    const int owner = (end + i) % ranks_;
    if (unit_of(owner) == unit) break;
    const int64_t n = rows[static_cast<size_t>(owner)];
    const auto group = static_cast<int>(std::min<int64_t>(before * stages / total, stages - 1));
    group_[static_cast<size_t>(unit) * static_cast<size_t>(ranks_) + static_cast<size_t>(owner)] =
        static_cast<uint16_t>(group);
    if (n > 0) groups_ = std::max(groups_, group + 1);
    before += n;
  }
}

int ExchangeRoutes::Relay(const ContextDemand& demand, int rank, int64_t head_pattern,
                          int32_t block) const {
  if (unit_ranks_ == 1) return rank;
  const int begin = unit_begin(rank), end = unit_end(rank);
  int needing = 0;
  for (int r = begin; r < end; ++r) needing += demand.Needs(r, head_pattern, block) ? 1 : 0;
  const uint64_t key = static_cast<uint64_t>(block) << 16 ^ static_cast<uint64_t>(head_pattern);
  auto chosen = static_cast<int>(Mix(key) % static_cast<uint64_t>(needing));
  for (int r = begin; r < end; ++r) {
    if (demand.Needs(r, head_pattern, block) && chosen-- == 0) return r;
  }
  LONGSPAN_CHECK(false) << "ExchangeRoutes: no rank of the unit of rank " << rank << " needs block "
                        << block;
  return rank;
}

}  // namespace longspan::parallel::internal
