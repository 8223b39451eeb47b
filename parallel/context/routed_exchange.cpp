#include "parallel/context/routed_exchange.h"

#include <utility>

namespace longspan::parallel {

class RoutedExchange::Requests {
 public:
  Requests(const RoutedPlan& plan, std::span<const uint8_t> bytes)
      : blocks_(plan.blocks->count()),
        per_head_((blocks_ + 7) / 8),
        kv_heads_(plan.kv_heads),
        bytes_(bytes) {
    LONGSPAN_CHECK(static_cast<int64_t>(bytes.size()) == plan.ranks * plan.RequestBytes())
        << "routed attention: requests of " << bytes.size() << " bytes";
  }
  bool Needs(int rank, int64_t kv_head, int64_t block) const {
    const int64_t at = (rank * kv_heads_ + kv_head) * per_head_ + block / 8;
    return (bytes_[static_cast<size_t>(at)] >> (block % 8) & 1) != 0;
  }
  // Calls visit(kv head, block) for every piece that `rank` needs, in this order.
  template <class Visit>
  void ForEachNeeded(int rank, const Visit& visit) const {
    for (int64_t h = 0; h < kv_heads_; ++h) {
      for (int64_t b = 0; b < blocks_; ++b) {
        if (Needs(rank, h, b)) visit(h, b);
      }
    }
  }

 private:
  int64_t blocks_, per_head_, kv_heads_;
  std::span<const uint8_t> bytes_;
};

namespace {

const ops::RoutedShare& ShareOf(const RoutedPlan& plan, int rank) {
  return plan.shares[static_cast<size_t>(rank)];
}

}  // namespace

RoutedExchange::RoutedExchange(const RoutedPlan& plan, std::span<const uint8_t> bytes)
    : rank_(plan.rank),
      kv_heads_(plan.kv_heads),
      blocks_(plan.blocks->count()),
      piece_row_(static_cast<size_t>(kv_heads_ * blocks_), -1) {
  const Requests requests(plan, bytes);
  for (int r = 0; r < plan.ranks; ++r) {
    int64_t rows = 0;
    requests.ForEachNeeded(r, [&](int64_t, int64_t b) {
      for (const RoutedPlan::Part& part : plan.parts[static_cast<size_t>(b)]) {
        if (part.rank != r) rows += ShareOf(plan, part.rank).TokensOf(part.index);
      }
    });
    keeps_.push_back(rows <= plan.keep_rows);
    if (r == rank_) received_rows_ = rows;
  }
  PlanArena(plan, requests);
  PlanSends(plan, requests);
}

void RoutedExchange::PlanArena(const RoutedPlan& plan, const Requests& requests) {
  // Where the part of a piece that comes from another rank arrives, by that rank and place there.
  std::vector<std::vector<int64_t>> arrivals(static_cast<size_t>(plan.ranks));
  for (int source = 0; source < plan.ranks; ++source) {
    if (source == rank_) continue;
    const ops::RoutedShare& share = ShareOf(plan, source);
    std::vector<int64_t>& rows = arrivals[static_cast<size_t>(source)];
    rows.assign(static_cast<size_t>(kv_heads_ * share.count()), -1);
    const int64_t begin = arena_rows_;
    for (int64_t h = 0; h < kv_heads_; ++h) {
      for (int64_t i = 0; i < share.count(); ++i) {
        if (!requests.Needs(rank_, h, share.block[static_cast<size_t>(i)])) continue;
        rows[static_cast<size_t>(h * share.count() + i)] = arena_rows_;
        arena_rows_ += share.TokensOf(i);
      }
    }
    if (arena_rows_ == begin) continue;
    const Message message{source, {Arena::kKept, begin, arena_rows_}};
    keys_.recvs.push_back(message);
    if (!keeps()) again_.recvs.push_back(message);
    grads_.sends.push_back({source, {Arena::kGrad, begin, arena_rows_}});
  }
  LONGSPAN_CHECK(arena_rows_ == received_rows_)
      << "routed attention: " << arena_rows_ << " rows of messages, " << received_rows_
      << " needed";

  std::vector<ops::RowRun> own, assemble, spread, home;
  requests.ForEachNeeded(rank_, [&](int64_t h, int64_t b) {
    const std::vector<RoutedPlan::Part>& parts = plan.parts[static_cast<size_t>(b)];
    const auto arrival = [&](const RoutedPlan::Part& part) {
      const int64_t count = ShareOf(plan, part.rank).count();
      return arrivals[static_cast<size_t>(part.rank)][static_cast<size_t>(h * count + part.index)];
    };
    int64_t& row = piece_row_[static_cast<size_t>(h * blocks_ + b)];
    if (parts.size() == 1 && parts[0].rank != rank_) {
      row = arrival(parts[0]);
      return;
    }
    row = arena_rows_;
    for (const RoutedPlan::Part& part : parts) {
      const ops::RoutedShare& share = ShareOf(plan, part.rank);
      const int64_t tokens = share.TokensOf(part.index), place = 2 * arena_rows_;
      if (part.rank == rank_) {
        const int64_t vector = share.begin[static_cast<size_t>(part.index)] * kv_heads_ + h;
        own.push_back({vector, place, tokens});
        home.push_back({place, vector, tokens});
      } else {
        assemble.push_back({2 * arrival(part), place, tokens});
        spread.push_back({place, 2 * arrival(part), tokens});
      }
      arena_rows_ += tokens;
    }
  });
  own_ = ops::RowTable(std::move(own), kv_heads_, 2);
  assemble_ = ops::RowTable(std::move(assemble), 2, 2);
  spread_ = ops::RowTable(std::move(spread), 2, 2);
  home_own_ = ops::RowTable(std::move(home), 2, kv_heads_);
}

void RoutedExchange::PlanSends(const RoutedPlan& plan, const Requests& requests) {
  const ops::RoutedShare& share = ShareOf(plan, rank_);
  std::vector<ops::RowRun> pack, home;
  for (int to = 0; to < plan.ranks; ++to) {
    if (to == rank_) continue;
    const int64_t begin = sent_rows_;
    for (int64_t h = 0; h < kv_heads_; ++h) {
      for (int64_t i = 0; i < share.count(); ++i) {
        if (!requests.Needs(to, h, share.block[static_cast<size_t>(i)])) continue;
        const int64_t vector = share.begin[static_cast<size_t>(i)] * kv_heads_ + h;
        const int64_t tokens = share.TokensOf(i);
        pack.push_back({vector, 2 * sent_rows_, tokens});
        home.push_back({2 * sent_rows_, vector, tokens});
        sent_rows_ += tokens;
      }
    }
    if (sent_rows_ == begin) continue;
    const Message message{to, {Arena::kWork, begin, sent_rows_}};
    keys_.sends.push_back(message);
    if (!keeps_[static_cast<size_t>(to)]) again_.sends.push_back(message);
    grads_.recvs.push_back(message);
  }
  pack_ = ops::RowTable(std::move(pack), kv_heads_, 2);
  home_ = ops::RowTable(std::move(home), 2, kv_heads_);  // sources of a place: ascending ranks
}

std::shared_ptr<const ops::KvTable> RoutedExchange::MakeTable(int64_t head_dim) const {
  std::vector<int64_t> offsets;
  offsets.reserve(piece_row_.size());
  for (const int64_t row : piece_row_) offsets.push_back(row < 0 ? -1 : row * 2 * head_dim);
  return std::make_shared<const ops::KvTable>(kv_heads_, 2 * head_dim, 0, std::move(offsets));
}

}  // namespace longspan::parallel
