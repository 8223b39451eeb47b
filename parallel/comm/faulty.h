#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "parallel/comm/communicator.h"

namespace longspan::parallel {

// What goes wrong, on purpose. Operations of a rank are counted from 0 in the order in which it
// issues them on the wrapped communicator and all made from it by Split; Split itself is none.
struct Fault {
  enum class Kind {
    kLose,   // from this operation on no message reaches this rank or leaves it
    kDelay,  // a sleep of `seconds` before this operation and before every later one
    kThrow,  // the rank ends with InjectedFault
  };
  Kind kind = Kind::kThrow;
  int rank = 0;  // of the wrapped communicator
  int64_t operation = 0;
  double seconds = 0;
};
// "lose:RANK:OPERATION", "delay:RANK:OPERATION:SECONDS" or "throw:RANK:OPERATION".
// Errors: InvalidArgument with the text and these forms.
Fault ParseFault(const std::string& text);

// The exception of kThrow: as unexpected as any other.
class InjectedFault : public Error {
  using Error::Error;
};

namespace internal {
struct FaultPlan;
}

// Decorator for tests of how a job ends when something fails. What is lost is never complete on its
// own rank either: Done is false, and Wait returns only with the CommError that the job ends with,
// or with one of its own after twice the time limit, when nobody has missed the operation.
//
// Construction is collective over the inner communicator, which every rank wraps with the same
// faults.
class FaultyCommunicator : public Communicator {
 public:
  // Does not own `inner`.
  FaultyCommunicator(Communicator& inner, std::vector<Fault> faults);

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string name() const override { return inner_->name(); }
  Work AllReduce(Tensor t, ReduceOp op) override;
  Work AllGather(Tensor in, Tensor out) override;
  Work ReduceScatter(Tensor in, Tensor out) override;
  Work Broadcast(Tensor t, int root) override;
  Work Exchange(std::vector<Send> sends, std::vector<Recv> recvs) override;
  void Barrier() override;
  void UseDevice(std::shared_ptr<cuda::Runtime> runtime) override {
    inner_->UseDevice(std::move(runtime));
  }
  void Progress() override { inner_->Progress(); }
  void Computed(double flops) override { inner_->Computed(flops); }
  Traffic SetTraffic(Traffic traffic) override { return inner_->SetTraffic(traffic); }
  void SetTimeout(double seconds) override;
  std::unique_ptr<Communicator> Split(int color, int key) override;
  [[noreturn]] void Abort(const std::string& reason) override;

 private:
  FaultyCommunicator(std::unique_ptr<Communicator> inner,
                     std::shared_ptr<internal::FaultPlan> plan);

  std::unique_ptr<Communicator> owned_;
  Communicator* inner_;
  std::shared_ptr<internal::FaultPlan> plan_;
};

}  // namespace longspan::parallel
