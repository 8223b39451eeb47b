#include "parallel/context/head_deal.h"

#include <algorithm>
#include <numeric>

#include "ops/core/check.h"

namespace longspan::parallel {
namespace {

struct Unit {
  int32_t kv_head;
  int64_t work;
};

// Units on their way to ranks.
class Table {
 public:
  Table(std::vector<Unit> units, int ranks)
      : units_(std::move(units)), on_(static_cast<size_t>(ranks)), load_(on_.size(), 0) {}

  // Longest first, to the rank with least work; among equals to one that has the kv head already,
  // then to the one with fewest units.
  void DealLongestFirst() {
    std::stable_sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) {
      return a.work != b.work ? a.work > b.work : a.kv_head < b.kv_head;
    });
    for (size_t u = 0; u < units_.size(); ++u) {
      size_t best = 0;
      for (size_t r = 1; r < on_.size(); ++r) {
        if (Before(r, best, units_[u].kv_head)) best = r;
      }
      Place(u, best);
    }
  }

  // Takes work from the busiest rank by moving one of its units, or by swapping it for a smaller
  // one, as long as that helps.
  void Improve() {
    for (size_t round = 0; round < 4 * units_.size(); ++round) {
      if (!ImproveOnce()) return;
    }
  }

  int64_t Busiest() const { return *std::max_element(load_.begin(), load_.end()); }

  // Units of each kv head on each rank.
  std::vector<std::vector<int64_t>> Counts(size_t kv_heads) const {
    std::vector<std::vector<int64_t>> counts(on_.size(), std::vector<int64_t>(kv_heads, 0));
    for (size_t r = 0; r < on_.size(); ++r) {
      for (const size_t u : on_[r]) ++counts[r][static_cast<size_t>(units_[u].kv_head)];
    }
    return counts;
  }

 private:
  bool Holds(size_t rank, int32_t kv_head) const {
    return std::any_of(on_[rank].begin(), on_[rank].end(),
                       [&](size_t u) { return units_[u].kv_head == kv_head; });
  }
  bool Before(size_t a, size_t b, int32_t kv_head) const {
    if (load_[a] != load_[b]) return load_[a] < load_[b];
    const bool has_a = Holds(a, kv_head), has_b = Holds(b, kv_head);
    if (has_a != has_b) return has_a;
    return on_[a].size() < on_[b].size();
  }
  void Place(size_t unit, size_t rank) {
    on_[rank].push_back(unit);
    load_[rank] += units_[unit].work;
  }

  bool ImproveOnce() {
    constexpr size_t kNone = static_cast<size_t>(-1);
    const size_t busy =
        static_cast<size_t>(std::max_element(load_.begin(), load_.end()) - load_.begin());
    int64_t best = load_[busy];
    size_t best_rank = 0, best_mine = 0, best_other = kNone;
    const auto consider = [&](size_t rank, size_t mine, size_t other, int64_t moved) {
      const int64_t worse = std::max(load_[busy] - moved, load_[rank] + moved);
      if (moved <= 0 || worse >= best) return;
      best = worse, best_rank = rank, best_mine = mine, best_other = other;
    };
    for (size_t rank = 0; rank < on_.size(); ++rank) {
      if (rank == busy) continue;
      for (size_t i = 0; i < on_[busy].size(); ++i) {
        const int64_t work = units_[on_[busy][i]].work;
        consider(rank, i, kNone, work);
        for (size_t j = 0; j < on_[rank].size(); ++j) {
          consider(rank, i, j, work - units_[on_[rank][j]].work);
        }
      }
    }
    if (best == load_[busy]) return false;
    const size_t mine = on_[busy][best_mine];
    on_[busy].erase(on_[busy].begin() + static_cast<std::ptrdiff_t>(best_mine));
    load_[busy] -= units_[mine].work;
    if (best_other != kNone) {
      const size_t other = on_[best_rank][best_other];
      on_[best_rank].erase(on_[best_rank].begin() + static_cast<std::ptrdiff_t>(best_other));
      load_[best_rank] -= units_[other].work;
      Place(other, busy);
    }
    Place(mine, best_rank);
    return true;
  }

  std::vector<Unit> units_;
  std::vector<std::vector<size_t>> on_;  // units of each rank
  std::vector<int64_t> load_;
};

HeadDeal DealUnits(std::span<const int64_t> work, int64_t group, int ranks, int64_t unit) {
  std::vector<Unit> units;
  for (size_t h = 0; h < work.size(); ++h) {
    for (int64_t i = 0; i < group / unit; ++i) {
      units.push_back({static_cast<int32_t>(h), unit * work[h]});
    }
  }
  Table table(std::move(units), ranks);
  table.DealLongestFirst();
  table.Improve();
  HeadDeal deal{std::vector<std::vector<int32_t>>(static_cast<size_t>(ranks)), table.Busiest()};
  const auto counts = table.Counts(work.size());
  for (size_t h = 0; h < work.size(); ++h) {  // a kv head's query heads in the order of ranks
    int64_t next = static_cast<int64_t>(h) * group;
    for (size_t r = 0; r < counts.size(); ++r) {
      for (int64_t i = 0; i < counts[r][h] * unit; ++i) {
        deal.queries[r].push_back(static_cast<int32_t>(next++));
      }
    }
  }
  return deal;
}

}  // namespace

HeadDeal DealHeads(std::span<const int64_t> work, int64_t group, int ranks) {
  LONGSPAN_CHECK(!work.empty() && group >= 1 && ranks >= 1)
      << "DealHeads: " << work.size() << " kv heads of " << group << " query heads on " << ranks
      << " ranks";
  std::vector<HeadDeal> deals;  // largest units first
  for (int64_t unit = group; unit >= 1; --unit) {
    if (group % unit == 0) deals.push_back(DealUnits(work, group, ranks, unit));
  }
  int64_t best = deals.front().work_max;
  for (const HeadDeal& deal : deals) best = std::min(best, deal.work_max);
  for (HeadDeal& deal : deals) {
    if (deal.work_max - best <= best / 100) return std::move(deal);
  }
  return std::move(deals.front());  // not reached: the best one is in the list
}

std::vector<std::vector<int32_t>> HeadSteps(std::span<const int32_t> queries,
                                            std::span<const int64_t> work, int64_t group,
                                            int64_t steps) {
  std::vector<std::vector<int32_t>> parts;  // by kv head
  for (const int32_t q : queries) {
    if (parts.empty() || parts.back().front() / group != q / group) parts.emplace_back();
    parts.back().push_back(q);
  }
  if (parts.size() == 1) {  // one kv head: by query head
    parts.clear();
    for (const int32_t q : queries) parts.push_back({q});
  }
  const auto cost = [&](const std::vector<int32_t>& part) {
    return static_cast<int64_t>(part.size()) * work[static_cast<size_t>(part.front() / group)];
  };
  int64_t total = 0, done = 0;
  for (const auto& part : parts) total += cost(part);
  const size_t count = std::min(static_cast<size_t>(steps), parts.size());
  std::vector<std::vector<int32_t>> out;
  for (size_t i = 0, s = 0; s < count; ++s) {
    const int64_t goal = total / static_cast<int64_t>(count) * static_cast<int64_t>(s + 1);
    std::vector<int32_t> step;
    // At least one part, and one is left for every later step; the last step takes all.
    while (i < parts.size() &&
           (step.empty() || s + 1 == count ||
            (done + cost(parts[i]) <= goal && parts.size() - i > count - s - 1))) {
      step.insert(step.end(), parts[i].begin(), parts[i].end());
      done += cost(parts[i++]);
    }
    out.push_back(std::move(step));
  }
  return out;
}

}  // namespace longspan::parallel
