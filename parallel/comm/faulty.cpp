#include "parallel/comm/faulty.h"

#include <charconv>
#include <chrono>
#include <cmath>
#include <exception>
#include <thread>

#include "parallel/comm/arguments.h"
#include "parallel/comm/comm_op.h"

namespace longspan::parallel {
namespace internal {

// The faults of one rank, shared by all its communicators.
struct FaultPlan {
  int rank = 0;
  std::vector<Fault> faults;
  int64_t issued = 0;
  double timeout_s = kDefaultTimeoutS;
  // Nobody else uses it: an operation on it stays pending until communication fails.
  std::unique_ptr<Communicator> lonely;

  // What happens to the next operation: true when it is lost.
  bool Meet(CommOp op) {
    const int64_t operation = issued++;
    bool lost = false;
    for (const Fault& fault : faults) {
      if (fault.rank != rank) continue;
      const bool now = operation == fault.operation;
      if (fault.kind == Fault::Kind::kDelay && operation >= fault.operation) {
        std::this_thread::sleep_for(std::chrono::duration<double>(fault.seconds));
      } else if (fault.kind == Fault::Kind::kThrow && now) {
        throw InjectedFault(Str("rank ", rank, " fails at ", ToString(op), " (operation ",
                                operation, "), as it was told to"));
      } else if (fault.kind == Fault::Kind::kLose && operation >= fault.operation) {
        lost = true;
      }
    }
    return lost;
  }
};

namespace {

class LostState : public Work::State {
 public:
  LostState(std::shared_ptr<FaultPlan> plan, CommOp op) : plan_(std::move(plan)), op_(op) {}
  bool Done() override { return false; }
  void Wait() override {
    Tensor nothing = HostTensor({1}, DType::kI64);
    nothing.data<int64_t>()[0] = 0;
    Work pending = plan_->lonely->AllReduce(nothing, ReduceOp::kSum);
    const auto start = std::chrono::steady_clock::now();
    while (!pending.Done()) {  // throws when communication has failed
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
      if (plan_->timeout_s > 0 && waited.count() > 2 * plan_->timeout_s) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    throw CommError(Str(ToString(op_), " of rank ", plan_->rank,
                        " was lost on purpose, and nobody else has missed it"));
  }
  double CompletedFraction() const override { return 0; }

 private:
  const std::shared_ptr<FaultPlan> plan_;
  const CommOp op_;
};

template <class F>
Work Issue(const std::shared_ptr<FaultPlan>& plan, CommOp op, F&& issue) {
  if (!plan->Meet(op)) return issue();
  return Work(std::make_shared<LostState>(plan, op));
}

}  // namespace
}  // namespace internal

using internal::Issue;

Fault ParseFault(const std::string& text) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == ':') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  Fault fault;
  bool good = parts.size() >= 3;
  const auto read = [&](size_t i, auto& value) {
    if (!good || i >= parts.size()) return void(good = false);
    const char* end = parts[i].data() + parts[i].size();
    const auto [at, error] = std::from_chars(parts[i].data(), end, value);
    good = error == std::errc() && at == end && value >= 0;
  };
  read(1, fault.rank);
  read(2, fault.operation);
  size_t expected = 3;
  if (parts[0] == "delay") {
    fault.kind = Fault::Kind::kDelay;
    read(3, fault.seconds);
    good = good && std::isfinite(fault.seconds);
    expected = 4;
  } else if (parts[0] == "lose") {
    fault.kind = Fault::Kind::kLose;
  } else {
    good = good && parts[0] == "throw";
  }
  if (good && parts.size() == expected) return fault;
  throw InvalidArgument(Str("\"", text, "\" is no fault (use lose:RANK:OPERATION, ",
                            "delay:RANK:OPERATION:SECONDS or throw:RANK:OPERATION)"));
}

FaultyCommunicator::FaultyCommunicator(Communicator& inner, std::vector<Fault> faults)
    : inner_(&inner), plan_(std::make_shared<internal::FaultPlan>()) {
  plan_->rank = inner.rank();
  plan_->faults = std::move(faults);
  plan_->lonely = inner.Split(0, inner.rank());
}

FaultyCommunicator::FaultyCommunicator(std::unique_ptr<Communicator> inner,
                                       std::shared_ptr<internal::FaultPlan> plan)
    : owned_(std::move(inner)), inner_(owned_.get()), plan_(std::move(plan)) {}

Work FaultyCommunicator::AllReduce(Tensor t, ReduceOp op) {
  return Issue(plan_, CommOp::kAllReduce, [&] { return inner_->AllReduce(t, op); });
}
Work FaultyCommunicator::AllGather(Tensor in, Tensor out) {
  return Issue(plan_, CommOp::kAllGather, [&] { return inner_->AllGather(in, out); });
}
Work FaultyCommunicator::ReduceScatter(Tensor in, Tensor out) {
  return Issue(plan_, CommOp::kReduceScatter, [&] { return inner_->ReduceScatter(in, out); });
}
Work FaultyCommunicator::Broadcast(Tensor t, int root) {
  return Issue(plan_, CommOp::kBroadcast, [&] { return inner_->Broadcast(t, root); });
}
Work FaultyCommunicator::Exchange(std::vector<Send> sends, std::vector<Recv> recvs) {
  return Issue(plan_, CommOp::kExchange,
               [&] { return inner_->Exchange(std::move(sends), std::move(recvs)); });
}

void FaultyCommunicator::Barrier() {
  Issue(plan_, CommOp::kBarrier, [&] {
    inner_->Barrier();
    return Work();
  }).Wait();
}

void FaultyCommunicator::SetTimeout(double seconds) {
  plan_->timeout_s = seconds;
  inner_->SetTimeout(seconds);
}

std::unique_ptr<Communicator> FaultyCommunicator::Split(int color, int key) {
  auto inner = inner_->Split(color, key);
  if (inner == nullptr) return nullptr;
  return std::unique_ptr<Communicator>(new FaultyCommunicator(std::move(inner), plan_));
}

void FaultyCommunicator::Abort(const std::string& reason) {
  inner_->Abort(reason);
  std::terminate();  // not reached; the compiler cannot see that the virtual call does not return
}

}  // namespace longspan::parallel
