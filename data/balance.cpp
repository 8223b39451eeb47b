#include "data/balance.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <set>

#include "data/permutation.h"
#include "ops/core/check.h"

namespace longspan::data {
namespace {

struct LongerFirst {
  bool operator()(const Piece& a, const Piece& b) const {  // of a queue: whether b comes first
    return a.tokens != b.tokens ? a.tokens < b.tokens : a.begin > b.begin;
  }
};

// Rows that are not full yet.
class OpenRows {
 public:
  OpenRows(int64_t count, int64_t length) : area_(static_cast<size_t>(count)) {
    room_.assign(static_cast<size_t>(count), length);
    for (int64_t r = 0; r < count; ++r) by_area_.insert({0, r}), by_room_.insert({-length, r});
  }
  // The row with the least area that has room for so many tokens; -1 without one.
  int64_t LeastArea(int64_t tokens) const {
    if (by_room_.empty() || -by_room_.begin()->first < tokens) return -1;
    for (const auto& [area, row] : by_area_) {
      if (room_[static_cast<size_t>(row)] >= tokens) return row;
    }
    return -1;
  }
  int64_t MostRoom() const { return by_room_.begin()->second; }
  int64_t room(int64_t row) const { return room_[static_cast<size_t>(row)]; }
  void Add(int64_t row, int64_t tokens) {
    int64_t &area = area_[static_cast<size_t>(row)], &room = room_[static_cast<size_t>(row)];
    by_area_.erase({area, row});
    by_room_.erase({-room, row});
    area += CausalArea(tokens);
    room -= tokens;
    if (room == 0) return;
    by_area_.insert({area, row});
    by_room_.insert({-room, row});
  }

 private:
  std::vector<int64_t> area_, room_;
  std::set<std::pair<int64_t, int64_t>> by_area_, by_room_;  // by_room_: negative, most room first
};

}  // namespace

std::vector<std::vector<Piece>> PackEvenly(std::vector<Piece> pieces, int64_t rows,
                                           int64_t length) {
  LONGSPAN_CHECK(rows >= 1 && length >= 1) << "PackEvenly: " << rows << " rows of " << length;
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.tokens;
  LONGSPAN_CHECK(total == rows * length)
      << "PackEvenly: " << total << " tokens for " << rows << " rows of " << length;
  std::vector<std::vector<Piece>> packed;
  for (Piece& piece : pieces) {
    for (; piece.tokens > length; piece.begin += length, piece.tokens -= length) {
      packed.push_back({{piece.begin, length}});
    }
  }
  const auto whole = static_cast<int64_t>(packed.size());
  packed.resize(static_cast<size_t>(rows));
  OpenRows open(rows - whole, length);
  const auto put = [&](int64_t row, const Piece& piece) {
    open.Add(row, piece.tokens);
    packed[static_cast<size_t>(whole + row)].push_back(piece);
  };
  std::priority_queue<Piece, std::vector<Piece>, LongerFirst> queue(LongerFirst(),
                                                                    std::move(pieces));
  while (!queue.empty()) {
    Piece piece = queue.top();
    queue.pop();
    if (piece.tokens == 0) continue;
    if (const int64_t row = open.LeastArea(piece.tokens); row >= 0) {
      put(row, piece);
      continue;
    }
    const int64_t row = open.MostRoom(), room = open.room(row);
    put(row, {piece.begin, room});
    queue.push({piece.begin + room, piece.tokens - room});
  }
  for (std::vector<Piece>& row : packed) {
    std::sort(row.begin(), row.end(),
              [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
  }
  return packed;
}

std::vector<int64_t> OrderInRuns(std::span<const int64_t> areas, int64_t run, uint64_t key) {
  const auto rows = static_cast<int64_t>(areas.size());
  LONGSPAN_CHECK(run >= 1) << "OrderInRuns: runs of " << run;
  std::vector<int64_t> sorted;
  if (rows == 0) return sorted;
  const KeyedPermutation shuffled(rows, key);
  for (int64_t i = 0; i < rows; ++i) sorted.push_back(shuffled[i]);
  std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) {
    return areas[static_cast<size_t>(a)] > areas[static_cast<size_t>(b)];
  });
  const int64_t runs = rows / run;
  if (runs == 0) return sorted;
  const KeyedPermutation order(runs, ~key);
  std::vector<int64_t> result;
  result.reserve(areas.size());
  for (int64_t i = 0; i < runs; ++i) {
    const auto first = sorted.begin() + order[i] * run;
    result.insert(result.end(), first, first + run);
  }
  result.insert(result.end(), sorted.begin() + runs * run, sorted.end());
  return result;
}

std::vector<int64_t> DealRows(std::span<const int64_t> areas, int64_t replicas,
                              int64_t micro_batch_rows) {
  const auto rows = static_cast<int64_t>(areas.size());
  const int64_t at_once = replicas * micro_batch_rows;
  LONGSPAN_CHECK(replicas >= 1 && micro_batch_rows >= 1 && rows % at_once == 0)
      << "DealRows: " << rows << " rows for " << replicas << " replicas with micro-batches of "
      << micro_batch_rows;
  std::vector<int64_t> sorted(areas.size());
  std::iota(sorted.begin(), sorted.end(), 0);
  std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) {
    return areas[static_cast<size_t>(a)] > areas[static_cast<size_t>(b)];
  });
  std::vector<int64_t> order(areas.size());
  std::vector<double> total(static_cast<size_t>(replicas));  // of a step: beyond 2^63 pairs
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    std::vector<int64_t> taken(static_cast<size_t>(replicas));
    for (int64_t k = begin; k < begin + at_once; ++k) {
      size_t least = total.size();
      for (size_t r = 0; r < total.size(); ++r) {
        if (taken[r] == micro_batch_rows) continue;
        if (least == total.size() || total[r] < total[least]) least = r;
      }
      const int64_t row = sorted[static_cast<size_t>(k)];
      const int64_t place = begin + static_cast<int64_t>(least) * micro_batch_rows + taken[least]++;
      order[static_cast<size_t>(place)] = row;
      total[least] += static_cast<double>(areas[static_cast<size_t>(row)]);
    }
  }
  return order;
}

}  // namespace longspan::data
