#include "parallel/comm/simulated.h"

#include <time.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <tuple>

#include "parallel/comm/local.h"

namespace longspan::parallel {
namespace internal {

// The clock of one rank; touched by its thread alone.
struct SimulatedRank {
  int world_rank = 0;
  ComputeClock compute = ComputeClock::kModelled;
  RankClock clock;
  double counted_s = 0;  // kCpuTime: processor time up to which the clock has counted

  static double ProcessorTime() {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }
  void Count() {
    if (compute != ComputeClock::kCpuTime) return;
    const double now_s = ProcessorTime();
    clock.Compute(now_s - counted_s);
    counted_s = now_s;
  }
  void Skip() {
    if (compute == ComputeClock::kCpuTime) counted_s = ProcessorTime();
  }
};

namespace {

// The lifetime of a call: what the rank has computed before counts, the call itself does not.
class Inside {
 public:
  explicit Inside(SimulatedRank& rank) : rank_(rank) { rank_.Count(); }
  ~Inside() { rank_.Skip(); }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  SimulatedRank& rank_;
};

}  // namespace

// The ranks of one communicator: what they have issued, and when it ends.
class SimulatedGroup {
 public:
  struct Record {  // of one operation
    CommOp op = CommOp::kBarrier;
    int64_t bytes = 0, sequence = 0;
    std::vector<double> ready;
    std::vector<std::vector<NetworkMessage>> sends;
    std::vector<char> issued;
    int count = 0;
    bool timed = false;
    std::vector<double> arrival;  // once it is timed
  };

  SimulatedGroup(const NetworkOptions& options, int size)
      : options_(options),
        world_ranks_(static_cast<size_t>(size), -1),
        left_(static_cast<size_t>(size)) {}

  bool Join(int rank, int world_rank) {  // false: somebody has joined as this rank before
    std::lock_guard lock(mutex_);
    int& place = world_ranks_[static_cast<size_t>(rank)];
    if (place >= 0) return false;
    place = world_rank;
    return true;
  }

  // `rank` issues nothing more.
  void Leave(int rank) {
    {
      std::lock_guard lock(mutex_);
      left_[static_cast<size_t>(rank)] = 1;
    }
    changed_.notify_all();
  }

  std::shared_ptr<const Record> Post(int rank, int64_t sequence, CommOp op, int64_t bytes,
                                     std::vector<NetworkMessage> sends, double ready_s) {
    const auto r = static_cast<size_t>(rank);
    std::lock_guard lock(mutex_);
    std::shared_ptr<Record>& record = records_[sequence];
    if (record == nullptr) {
      record = std::make_shared<Record>();
      record->op = op;
      record->bytes = bytes;
      record->sequence = sequence;
      record->ready.resize(world_ranks_.size());
      record->sends.resize(world_ranks_.size());
      record->issued.resize(world_ranks_.size());
    }
    record->ready[r] = ready_s;
    record->sends[r] = std::move(sends);
    record->issued[r] = 1;
    const std::shared_ptr<Record> mine = record;
    if (++mine->count == static_cast<int>(world_ranks_.size())) {
      // All have issued this operation, hence all before it, which are timed.
      Time(*mine);
      records_.erase(sequence);
      changed_.notify_all();
    }
    return mine;
  }

  // When the operation ends on `rank`; waits until that is known.
  double Await(const Record& record, int rank, double timeout_s) {
    std::unique_lock lock(mutex_);
    std::optional<int> ended;
    const auto settled = [&] {
      if (record.timed) return true;
      for (size_t r = 0; r < left_.size() && !ended; ++r) {
        if (left_[r] && !record.issued[r]) ended = static_cast<int>(r);
      }
      return ended.has_value();
    };
    if (timeout_s <= 0) {
      changed_.wait(lock, settled);
    } else if (!changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), settled)) {
      throw PeerFailed(Str("rank ", rank, " of ", left_.size(), " waited ", timeout_s,
                           " s for the time of ", Name(record), "; not issued by rank",
                           Missing(record)));
    }
    if (record.timed) return record.arrival[static_cast<size_t>(rank)];
    throw PeerFailed(
        Str("rank ", *ended, " ended without ", Name(record), " that rank ", rank, " waits for"));
  }

  void ResetPorts() {
    std::lock_guard lock(mutex_);
    if (timer_) timer_->Reset();
  }

 private:
  static std::string Name(const Record& record) {
    return Str(ToString(record.op), " (operation ", record.sequence, ")");
  }
  static std::string Missing(const Record& record) {
    std::string ranks;
    for (size_t r = 0; r < record.issued.size(); ++r) {
      if (!record.issued[r]) ranks += Str(" ", r);
    }
    return ranks;
  }
  void Time(Record& record) {
    if (!timer_) timer_.emplace(options_, world_ranks_);
    if (record.op == CommOp::kExchange) {
      record.arrival = timer_->Exchange(record.ready, record.sends);
    } else {
      record.arrival.assign(world_ranks_.size(),
                            timer_->Collective(record.op, record.bytes, record.ready));
    }
    record.timed = true;
  }

  const NetworkOptions options_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int> world_ranks_;  // -1: has not joined
  std::vector<char> left_;
  std::map<int64_t, std::shared_ptr<Record>> records_;  // those that some rank has not issued
  std::optional<NetworkTimer> timer_;                   // once all have joined
};

class SimulatedHub {
 public:
  SimulatedHub(int ranks, const NetworkOptions& options)
      : ranks_(ranks), options_(options), world_(NewGroup(ranks)) {}

  int ranks() const { return ranks_; }
  const NetworkOptions& options() const { return options_; }
  const std::shared_ptr<SimulatedGroup>& world() const { return world_; }
  double timeout_s() const { return timeout_s_; }
  void SetTimeout(double seconds) { timeout_s_ = seconds; }

  // The group of `size` ranks with one color that the n-th Split of `parent` has made.
  std::shared_ptr<SimulatedGroup> Part(const SimulatedGroup* parent, int64_t n, int color,
                                       int size) {
    std::lock_guard lock(mutex_);
    const auto key = std::tuple(parent, n, color);
    auto& [group, joined] = parts_[key];
    if (group == nullptr) group = NewGroup(size);
    const std::shared_ptr<SimulatedGroup> mine = group;
    if (++joined == size) parts_.erase(key);
    return mine;
  }
  void ResetPorts() {
    std::lock_guard lock(mutex_);
    for (const auto& weak : groups_) {
      if (const auto group = weak.lock()) group->ResetPorts();
    }
  }

 private:
  std::shared_ptr<SimulatedGroup> NewGroup(int size) {
    auto group = std::make_shared<SimulatedGroup>(options_, size);
    std::erase_if(groups_, [](const auto& g) { return g.expired(); });
    groups_.push_back(group);
    return group;
  }

  const int ranks_;
  const NetworkOptions options_;
  std::atomic<double> timeout_s_{kDefaultTimeoutS};
  std::mutex mutex_;
  std::vector<std::weak_ptr<SimulatedGroup>> groups_;
  // Until all their ranks have joined.
  std::map<std::tuple<const SimulatedGroup*, int64_t, int>,
           std::pair<std::shared_ptr<SimulatedGroup>, int>>
      parts_;
  const std::shared_ptr<SimulatedGroup> world_;
};

namespace {

class SimulatedState : public Work::State {
 public:
  SimulatedState(Work work, std::shared_ptr<SimulatedHub> hub,
                 std::shared_ptr<SimulatedGroup> group, std::shared_ptr<SimulatedRank> me, int rank,
                 std::shared_ptr<const SimulatedGroup::Record> record)
      : work_(std::move(work)),
        hub_(std::move(hub)),
        group_(std::move(group)),
        me_(std::move(me)),
        rank_(rank),
        record_(std::move(record)) {}
  bool Done() override {
    const Inside inside(*me_);
    return work_.Done();
  }
  void Wait() override {
    const Inside inside(*me_);
    Work(work_).Wait();  // a copy: asked for Done later, the operation may tell of a failure
    me_->clock.WaitUntil(group_->Await(*record_, rank_, hub_->timeout_s()));
  }
  double CompletedFraction() const override { return work_.CompletedFraction(); }

 private:
  Work work_;
  const std::shared_ptr<SimulatedHub> hub_;
  const std::shared_ptr<SimulatedGroup> group_;
  const std::shared_ptr<SimulatedRank> me_;
  const int rank_;
  const std::shared_ptr<const SimulatedGroup::Record> record_;
};

}  // namespace
}  // namespace internal

using internal::Inside;

SimulatedNetwork::SimulatedNetwork(int ranks, const NetworkOptions& options) {
  LONGSPAN_CHECK(ranks >= 1) << "SimulatedNetwork of " << ranks << " ranks";
  CheckNetwork(options);
  hub_ = std::make_shared<internal::SimulatedHub>(ranks, options);
}
SimulatedNetwork::~SimulatedNetwork() = default;

int SimulatedNetwork::ranks() const { return hub_->ranks(); }
const NetworkOptions& SimulatedNetwork::options() const { return hub_->options(); }

SimulatedCommunicator::SimulatedCommunicator(Communicator& inner, SimulatedNetwork& network)
    : inner_(&inner),
      hub_(network.hub_),
      group_(hub_->world()),
      me_(std::make_shared<internal::SimulatedRank>()) {
  LONGSPAN_CHECK(inner.size() == hub_->ranks())
      << "SimulatedCommunicator: " << inner.size() << " ranks on a network of " << hub_->ranks();
  LONGSPAN_CHECK(group_->Join(inner.rank(), inner.rank()))
      << "SimulatedCommunicator: rank " << inner.rank() << " has joined this network before";
  me_->world_rank = inner.rank();
  me_->compute = hub_->options().compute;
  me_->Skip();
}

SimulatedCommunicator::SimulatedCommunicator(std::unique_ptr<Communicator> inner,
                                             std::shared_ptr<internal::SimulatedHub> hub,
                                             std::shared_ptr<internal::SimulatedGroup> group,
                                             std::shared_ptr<internal::SimulatedRank> me)
    : owned_(std::move(inner)),
      inner_(owned_.get()),
      hub_(std::move(hub)),
      group_(std::move(group)),
      me_(std::move(me)) {
  group_->Join(inner_->rank(), me_->world_rank);
}

SimulatedCommunicator::~SimulatedCommunicator() { group_->Leave(inner_->rank()); }

double SimulatedCommunicator::now_s() {
  me_->Count();
  return me_->clock.now_s;
}
double SimulatedCommunicator::compute_s() {
  me_->Count();
  return me_->clock.compute_s;
}
double SimulatedCommunicator::exposed_s() { return me_->clock.exposed_s; }

void SimulatedCommunicator::ResetClocks() {
  const Inside inside(*me_);
  LONGSPAN_CHECK(size() == hub_->ranks())
      << "ResetClocks on " << size() << " of the " << hub_->ranks() << " ranks of the network";
  inner_->Barrier();
  if (rank() == 0) hub_->ResetPorts();
  inner_->Barrier();
  me_->clock = {};
}

template <class F>
Work SimulatedCommunicator::Issue(CommOp op, int64_t bytes, std::vector<NetworkMessage> sends,
                                  F&& issue) {
  const Inside inside(*me_);
  Work work = issue();  // first: what it refuses has not been issued
  auto record = group_->Post(rank(), sequence_++, op, bytes, std::move(sends), me_->clock.now_s);
  return Work(std::make_shared<internal::SimulatedState>(std::move(work), hub_, group_, me_, rank(),
                                                         std::move(record)));
}

namespace {
int64_t BytesOf(const Tensor& t) { return t.defined() ? static_cast<int64_t>(t.bytes()) : 0; }
}  // namespace

Work SimulatedCommunicator::AllReduce(Tensor t, ReduceOp op) {
  return Issue(CommOp::kAllReduce, BytesOf(t), {}, [&] { return inner_->AllReduce(t, op); });
}
Work SimulatedCommunicator::AllGather(Tensor in, Tensor out) {
  return Issue(CommOp::kAllGather, BytesOf(in), {}, [&] { return inner_->AllGather(in, out); });
}
Work SimulatedCommunicator::ReduceScatter(Tensor in, Tensor out) {
  return Issue(CommOp::kReduceScatter, BytesOf(out), {},
               [&] { return inner_->ReduceScatter(in, out); });
}
Work SimulatedCommunicator::Broadcast(Tensor t, int root) {
  return Issue(CommOp::kBroadcast, BytesOf(t), {}, [&] { return inner_->Broadcast(t, root); });
}

Work SimulatedCommunicator::Exchange(std::vector<Send> sends, std::vector<Recv> recvs) {
  std::vector<NetworkMessage> messages;
  for (const Send& s : sends) messages.push_back({s.peer, s.bytes});
  return Issue(CommOp::kExchange, 0, std::move(messages),
               [&] { return inner_->Exchange(std::move(sends), std::move(recvs)); });
}

void SimulatedCommunicator::Barrier() {
  const Inside inside(*me_);
  const auto record = group_->Post(rank(), sequence_++, CommOp::kBarrier, 0, {}, me_->clock.now_s);
  inner_->Barrier();
  me_->clock.WaitUntil(group_->Await(*record, rank(), hub_->timeout_s()));
}

void SimulatedCommunicator::Progress() {
  const Inside inside(*me_);
  inner_->Progress();
}

void SimulatedCommunicator::Computed(double flops) {
  LONGSPAN_CHECK(std::isfinite(flops) && flops >= 0) << "Computed: " << flops << " operations";
  if (hub_->options().compute == ComputeClock::kModelled) {
    me_->clock.Compute(flops / hub_->options().flops_per_s);
  }
  inner_->Computed(flops);
}

void SimulatedCommunicator::SetTimeout(double seconds) {
  hub_->SetTimeout(seconds);
  inner_->SetTimeout(seconds);
}

std::unique_ptr<Communicator> SimulatedCommunicator::Split(int color, int key) {
  const Inside inside(*me_);
  auto inner = inner_->Split(color, key);
  const int64_t n = splits_++;
  if (inner == nullptr) return nullptr;
  auto part = hub_->Part(group_.get(), n, color, inner->size());
  return std::unique_ptr<Communicator>(
      new SimulatedCommunicator(std::move(inner), hub_, std::move(part), me_));
}

void SimulatedCommunicator::Abort(const std::string& reason) {
  inner_->Abort(reason);
  std::terminate();  // not reached; the compiler cannot see that the virtual call does not return
}

}  // namespace longspan::parallel
