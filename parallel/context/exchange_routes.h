#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel/context/builder.h"

namespace longspan::parallel::internal {

// What all ranks of an exchange must agree on, derived by each of them alone: in which group a
// rank's keys travel to another, who passes keys on inside a node, and who keeps what it receives.
// A unit is a node where keys cross between nodes once, else a rank.
class ExchangeRoutes {
 public:
  ExchangeRoutes(const ContextDemand& demand, const StrategyOptions& options);

  int ranks() const { return ranks_; }
  // Ranks [unit * unit_ranks, ...): neighbours share a unit.
  int unit_of(int rank) const { return rank / unit_ranks_; }
  int unit_begin(int rank) const { return unit_of(rank) * unit_ranks_; }
  int unit_end(int rank) const { return std::min(ranks_, unit_begin(rank) + unit_ranks_); }
  // Groups of keys from other units that some unit needs, numbered 0, 1, ...
  int groups() const { return groups_; }
  // Whether some rank needs keys of another rank of its unit.
  bool neighbours() const { return neighbours_; }
  // Whether some rank gets keys from another unit by way of a neighbour.
  bool forwards() const { return forwards_; }
  // The group in which the keys of `owner` travel to the ranks of `unit`, which is another.
  int group_of(int unit, int owner) const {
    return group_[static_cast<size_t>(unit) * static_cast<size_t>(ranks_) +
                  static_cast<size_t>(owner)];
  }
  // The rank that gets this block from its owner in another unit: one of `rank`'s unit that needs
  // it. `rank` does.
  int Relay(const ContextDemand& demand, int rank, int64_t head_pattern, int32_t block) const;
  // Whether `rank` keeps the keys that it receives for the backward pass.
  bool keeps(int rank) const { return keeps_[static_cast<size_t>(rank)] != 0; }
  bool all_keep() const { return all_keep_; }

 private:
  void Count(const ContextDemand& demand, int unit, std::vector<int64_t>& distinct,
             std::vector<int64_t>& received);
  void DealGroups(int unit, int stages, const std::vector<int64_t>& rows);

  const int ranks_, unit_ranks_;
  int groups_ = 0;
  bool neighbours_ = false, forwards_ = false, all_keep_ = true;
  std::vector<uint16_t> group_;  // [unit, owner]
  std::vector<uint8_t> keeps_;   // [rank]
};

Programs WriteExchange(const ContextDemand& demand, const ExchangeRoutes& routes, int rank,
                       bool with_masks);

}  // namespace longspan::parallel::internal
