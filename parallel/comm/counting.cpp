#include "parallel/comm/counting.h"

#include <glog/logging.h>

#include <chrono>
#include <deque>
#include <exception>
#include <mutex>
#include <utility>

namespace longspan::parallel {
namespace internal {

// Counters and the recent operations of one communicator; adds to its ancestors as well.
class CommLedger {
 public:
  using Clock = std::chrono::steady_clock;

  explicit CommLedger(std::shared_ptr<CommLedger> parent) : parent_(std::move(parent)) {}

  int64_t Begin(CommOp op, Traffic traffic, int64_t bytes, std::string details) {
    Count(op, traffic, bytes);
    std::lock_guard lock(mutex_);
    recent_.push_back({.number = next_, .op = op, .details = std::move(details)});
    if (recent_.size() > CountingCommunicator::kRecentOperations) recent_.pop_front();
    return next_++;
  }
  void End(int64_t number) {
    std::lock_guard lock(mutex_);
    if (recent_.empty() || number < recent_.front().number) return;
    Entry& entry = recent_[static_cast<size_t>(number - recent_.front().number)];
    if (!entry.done) entry.end = Clock::now();
    entry.done = true;
  }
  CommCounts counts() const {
    std::lock_guard lock(mutex_);
    return counts_;
  }
  void Reset() {
    std::lock_guard lock(mutex_);
    counts_ = {};
  }
  std::vector<std::string> Recent() const {
    std::lock_guard lock(mutex_);
    std::vector<std::string> lines;
    for (const Entry& e : recent_) {
      const auto end = e.done ? e.end : Clock::now();
      const double seconds = std::chrono::duration<double>(end - e.start).count();
      lines.push_back(Str("#", e.number, " ", ToString(e.op), ": ", e.details,
                          e.done ? ", done in " : ", pending for ", seconds, " s"));
    }
    return lines;
  }

 private:
  struct Entry {
    int64_t number = 0;
    CommOp op = CommOp::kBarrier;
    std::string details;
    Clock::time_point start = Clock::now(), end{};
    bool done = false;
  };

  void Count(CommOp op, Traffic traffic, int64_t bytes) {
    {
      std::lock_guard lock(mutex_);
      CommCount& count =
          traffic == Traffic::kControl ? counts_.control : counts_.ops[static_cast<size_t>(op)];
      ++count.calls;
      count.bytes += bytes;
      counts_.bytes_of[static_cast<size_t>(traffic)] += bytes;
    }
    if (parent_ != nullptr) parent_->Count(op, traffic, bytes);
  }

  std::shared_ptr<CommLedger> parent_;
  mutable std::mutex mutex_;
  CommCounts counts_;
  std::deque<Entry> recent_;  // consecutive numbers
  int64_t next_ = 0;
};

namespace {

// Calls `f`; on CommError logs what this rank did last and passes the error on.
template <class F>
auto Explain(const CommLedger& ledger, F&& f) {
  try {
    return f();
  } catch (const CommError& e) {
    std::string text;
    for (const std::string& line : ledger.Recent()) text += "\n  " + line;
    LOG(ERROR) << e.what() << "; the last operations of this rank were:" << text;
    throw;
  }
}

class CountingState : public Work::State {
 public:
  CountingState(Work work, std::shared_ptr<CommLedger> ledger, int64_t number)
      : work_(std::move(work)), ledger_(std::move(ledger)), number_(number) {}
  bool Done() override {
    const bool done = Explain(*ledger_, [&] { return work_.Done(); });
    if (done) ledger_->End(number_);
    return done;
  }
  void Wait() override {
    // A copy waits: asked for Done later, the operation may still tell of a failure.
    Explain(*ledger_, [&] { Work(work_).Wait(); });
    ledger_->End(number_);
  }
  double CompletedFraction() const override { return work_.CompletedFraction(); }

 private:
  Work work_;
  std::shared_ptr<CommLedger> ledger_;
  int64_t number_;
};

// Issues an operation that is counted from the moment it is accepted.
template <class F>
Work Counted(const std::shared_ptr<CommLedger>& ledger, CommOp op, Traffic traffic, int64_t bytes,
             std::string details, F&& issue) {
  Work work = Explain(*ledger, issue);
  const int64_t number = ledger->Begin(op, traffic, bytes, std::move(details));
  return Work(std::make_shared<CountingState>(std::move(work), ledger, number));
}

}  // namespace
}  // namespace internal

using internal::CommLedger;
using internal::Counted;

CommCount CommCounts::Total() const {
  CommCount total;
  for (const CommCount& count : ops) {
    total.calls += count.calls;
    total.bytes += count.bytes;
  }
  return total;
}

CountingCommunicator::CountingCommunicator(std::unique_ptr<Communicator> inner)
    : CountingCommunicator(std::move(inner), nullptr) {}

CountingCommunicator::CountingCommunicator(Communicator& inner)
    : inner_(&inner), ledger_(std::make_shared<CommLedger>(nullptr)) {}

CountingCommunicator::CountingCommunicator(std::unique_ptr<Communicator> inner,
                                           std::shared_ptr<CommLedger> parent)
    : owned_(std::move(inner)),
      inner_(owned_.get()),
      ledger_(std::make_shared<CommLedger>(std::move(parent))) {}

CommCounts CountingCommunicator::counts() const { return ledger_->counts(); }
void CountingCommunicator::ResetCounts() { ledger_->Reset(); }
std::vector<std::string> CountingCommunicator::RecentOperations() const {
  return ledger_->Recent();
}

Work CountingCommunicator::AllReduce(Tensor t, ReduceOp op) {
  const auto bytes = t.defined() ? static_cast<int64_t>(t.bytes()) : 0;
  return Counted(ledger_, CommOp::kAllReduce, traffic_, 2 * (size() - 1) * bytes / size(),
                 t.Describe(), [&] { return inner_->AllReduce(t, op); });
}

Work CountingCommunicator::AllGather(Tensor in, Tensor out) {
  const auto bytes = in.defined() ? static_cast<int64_t>(in.bytes()) : 0;
  return Counted(ledger_, CommOp::kAllGather, traffic_, (size() - 1) * bytes, in.Describe(),
                 [&] { return inner_->AllGather(in, out); });
}

Work CountingCommunicator::ReduceScatter(Tensor in, Tensor out) {
  const auto bytes = out.defined() ? static_cast<int64_t>(out.bytes()) : 0;
  return Counted(ledger_, CommOp::kReduceScatter, traffic_, (size() - 1) * bytes, in.Describe(),
                 [&] { return inner_->ReduceScatter(in, out); });
}

Work CountingCommunicator::Broadcast(Tensor t, int root) {
  const auto bytes = t.defined() ? static_cast<int64_t>(t.bytes()) : 0;
  return Counted(ledger_, CommOp::kBroadcast, traffic_, rank() == root ? (size() - 1) * bytes : 0,
                 Str(t.Describe(), " from rank ", root),
                 [&] { return inner_->Broadcast(t, root); });
}

Work CountingCommunicator::Exchange(std::vector<Send> sends, std::vector<Recv> recvs) {
  int64_t sent = 0, received = 0;
  for (const Send& s : sends) sent += s.peer == rank() ? 0 : s.bytes;
  for (const Recv& r : recvs) received += r.peer == rank() ? 0 : r.bytes;
  return Counted(ledger_, CommOp::kExchange, traffic_, sent,
                 Str(sends.size(), " sends of ", sent, " bytes, ", recvs.size(), " receives of ",
                     received, " bytes"),
                 [&] { return inner_->Exchange(std::move(sends), std::move(recvs)); });
}

void CountingCommunicator::Barrier() {
  const int64_t number = ledger_->Begin(CommOp::kBarrier, traffic_, 0, Str(size(), " ranks"));
  internal::Explain(*ledger_, [&] { inner_->Barrier(); });
  ledger_->End(number);
}

std::unique_ptr<Communicator> CountingCommunicator::Split(int color, int key) {
  const int64_t number =
      ledger_->Begin(CommOp::kSplit, traffic_, 0, Str("color ", color, ", key ", key));
  auto inner = internal::Explain(*ledger_, [&] { return inner_->Split(color, key); });
  ledger_->End(number);
  if (inner == nullptr) return nullptr;
  return std::unique_ptr<Communicator>(new CountingCommunicator(std::move(inner), ledger_));
}

void CountingCommunicator::Abort(const std::string& reason) {
  inner_->Abort(reason);
  std::terminate();  // not reached; the compiler cannot see that the virtual call does not return
}

}  // namespace longspan::parallel
