#include "parallel/context/predict.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "ops/core/error.h"

namespace longspan::parallel {
namespace {

using Kind = TimelineEvent::Kind;

[[noreturn]] void Refuse(const std::string& what) { throw InvalidArgument("Predict: " + what); }

// The posts of all ranks, checked: transfers[n] is the n-th transfer of every rank.
struct Transfers {
  std::unordered_map<int32_t, size_t> place;             // of a transfer's id
  std::vector<std::vector<const TimelineEvent*>> posts;  // by place and rank
};

void CheckMessages(const std::vector<TimelineMessage>& messages, const char* what, size_t rank,
                   int32_t transfer, size_t ranks) {
  for (const TimelineMessage& m : messages) {
    if (m.peer < 0 || static_cast<size_t>(m.peer) >= ranks || m.bytes < 0) {
      Refuse(Str("rank ", rank, " of ", ranks, " has a ", what, " of ", m.bytes,
                 " bytes with peer ", m.peer, " in transfer ", transfer));
    }
  }
}

// Notes the n-th post of rank `rank`; rank 0 decides the order.
void AddPost(Transfers& transfers, size_t rank, size_t n, const TimelineEvent& event,
             size_t ranks) {
  CheckMessages(event.sends, "send", rank, event.transfer, ranks);
  CheckMessages(event.recvs, "receive", rank, event.transfer, ranks);
  if (rank == 0) {
    if (!transfers.place.emplace(event.transfer, n).second) {
      Refuse(Str("rank 0 posts transfer ", event.transfer, " twice"));
    }
    transfers.posts.emplace_back(ranks);
  } else if (n >= transfers.posts.size()) {
    Refuse(Str("rank ", rank, " posts transfer ", event.transfer, " after all ",
               transfers.posts.size(), " transfers of rank 0"));
  } else if (const int32_t other = transfers.posts[n][0]->transfer; other != event.transfer) {
    Refuse(Str("rank ", rank, " posts transfer ", event.transfer, " where rank 0 posts transfer ",
               other));
  }
  transfers.posts[n][rank] = &event;
}

// Messages between every two ranks must agree in number, order and size.
void CheckPairs(const std::vector<const TimelineEvent*>& posts) {
  struct Half {
    int peer;
    int64_t bytes;
  };
  std::vector<std::vector<Half>> sent(posts.size());  // to each rank, by sender in list order
  for (size_t from = 0; from < posts.size(); ++from) {
    for (const TimelineMessage& m : posts[from]->sends) {
      if (m.bytes > 0)
        sent[static_cast<size_t>(m.peer)].push_back({static_cast<int>(from), m.bytes});
    }
  }
  const int32_t transfer = posts[0]->transfer;
  std::vector<Half> wanted;
  for (size_t to = 0; to < posts.size(); ++to) {
    wanted.clear();
    for (const TimelineMessage& m : posts[to]->recvs) {
      if (m.bytes > 0) wanted.push_back({m.peer, m.bytes});
    }
    std::ranges::stable_sort(wanted, {}, &Half::peer);
    const std::vector<Half>& came = sent[to];
    for (size_t i = 0; i < std::max(wanted.size(), came.size()); ++i) {
      if (i == wanted.size() || (i < came.size() && came[i].peer < wanted[i].peer)) {
        Refuse(Str("rank ", came[i].peer, " sends ", came[i].bytes, " bytes to rank ", to,
                   " in transfer ", transfer, ", which does not receive them"));
      }
      if (i == came.size() || wanted[i].peer < came[i].peer) {
        Refuse(Str("rank ", to, " receives ", wanted[i].bytes, " bytes from rank ", wanted[i].peer,
                   " in transfer ", transfer, ", which does not send them"));
      }
      if (wanted[i].bytes != came[i].bytes) {
        Refuse(Str("rank ", came[i].peer, " sends ", came[i].bytes, " bytes to rank ", to,
                   " in transfer ", transfer, ", which expects ", wanted[i].bytes));
      }
    }
  }
}

Transfers CheckedTransfers(const std::vector<Timeline>& ranks) {
  Transfers transfers;
  for (size_t r = 0; r < ranks.size(); ++r) {
    size_t posted = 0;
    for (const TimelineEvent& event : ranks[r]) {
      if (event.kind == Kind::kPost) {
        AddPost(transfers, r, posted++, event, ranks.size());
      } else if (event.kind == Kind::kWait) {
        const auto it = transfers.place.find(event.transfer);
        if (it == transfers.place.end() || it->second >= posted) {
          Refuse(
              Str("rank ", r, " waits for transfer ", event.transfer, ", which it has not posted"));
        }
      } else if (!std::isfinite(event.flops) || event.flops < 0) {
        Refuse(Str("rank ", r, " computes ", event.flops, " operations"));
      }
    }
    if (posted < transfers.posts.size()) {
      Refuse(Str("rank ", r, " posts ", posted, " transfers and rank 0 posts ",
                 transfers.posts.size()));
    }
  }
  for (const auto& posts : transfers.posts) CheckPairs(posts);
  return transfers;
}

// Lets every rank go on until it waits for a transfer that some rank has not posted. The rank that
// has posted the fewest transfers never does, so the ranks get to the end.
class Replay {
 public:
  Replay(const NetworkOptions& options, const std::vector<Timeline>& ranks)
      : options_(options),
        ranks_(ranks),
        transfers_(CheckedTransfers(ranks)),
        timer_(options, WorldRanks(ranks.size())),
        next_(ranks.size()),
        posted_(ranks.size()),
        clocks_(ranks.size()),
        ready_(transfers_.posts.size(), std::vector<double>(ranks.size())),
        count_(transfers_.posts.size()) {}

  Prediction Run() {
    for (bool ended = false; !ended;) {
      ended = true;
      for (size_t r = 0; r < ranks_.size(); ++r) ended = Advance(r) && ended;
    }
    Prediction prediction;
    for (const RankClock& clock : clocks_) {
      prediction.ranks.push_back({clock.now_s, clock.compute_s, clock.exposed_s});
      RankPrediction& most = prediction.largest;
      most.finish_s = std::max(most.finish_s, clock.now_s);
      most.compute_s = std::max(most.compute_s, clock.compute_s);
      most.exposed_s = std::max(most.exposed_s, clock.exposed_s);
    }
    return prediction;
  }

 private:
  static std::vector<int> WorldRanks(size_t n) {
    std::vector<int> ranks(n);
    for (size_t r = 0; r < n; ++r) ranks[r] = static_cast<int>(r);
    return ranks;
  }

  bool Advance(size_t rank) {  // true at the end of its timeline
    RankClock& clock = clocks_[rank];
    for (size_t& at = next_[rank]; at < ranks_[rank].size(); ++at) {
      const TimelineEvent& event = ranks_[rank][at];
      if (event.kind == Kind::kCompute) {
        clock.Compute(event.flops / options_.flops_per_s);
      } else if (event.kind == Kind::kPost) {
        Post(posted_[rank]++, rank, clock.now_s);
      } else {
        const size_t n = transfers_.place.at(event.transfer);
        if (count_[n] < ranks_.size()) return false;
        clock.WaitUntil(ready_[n][rank]);
      }
    }
    return true;
  }

  // Once all have posted it, ready_ turns from the times of posting to those of arrival.
  void Post(size_t n, size_t rank, double now_s) {
    ready_[n][rank] = now_s;
    if (++count_[n] < ranks_.size()) return;
    std::vector<std::vector<NetworkMessage>> sends(ranks_.size());
    for (size_t r = 0; r < ranks_.size(); ++r) {
      for (const TimelineMessage& m : transfers_.posts[n][r]->sends) {
        sends[r].push_back({m.peer, m.bytes});
      }
    }
    ready_[n] = timer_.Exchange(ready_[n], sends);
  }

  const NetworkOptions& options_;
  const std::vector<Timeline>& ranks_;
  const Transfers transfers_;
  NetworkTimer timer_;
  std::vector<size_t> next_, posted_;  // by rank: events done, transfers posted
  std::vector<RankClock> clocks_;
  std::vector<std::vector<double>> ready_;  // by transfer and rank
  std::vector<size_t> count_;               // by transfer: ranks that have posted it
};

}  // namespace

Prediction Predict(const NetworkOptions& options, const std::vector<Timeline>& ranks) {
  CheckNetwork(options);
  if (options.compute != ComputeClock::kModelled) {
    Refuse("the processor time of a thread cannot be foretold (use ComputeClock::kModelled)");
  }
  if (ranks.empty()) Refuse("there are no ranks");
  return Replay(options, ranks).Run();
}

}  // namespace longspan::parallel
