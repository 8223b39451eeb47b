#pragma once
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "parallel/comm/communicator.h"
#include "parallel/comm/network.h"

namespace longspan::parallel {

namespace internal {
class SimulatedGroup;
class SimulatedHub;
struct SimulatedRank;
}  // namespace internal

// The network that the ranks of one job in this process pretend to use. Outlives their
// communicators.
class SimulatedNetwork {
 public:
  // Errors: as CheckNetwork.
  SimulatedNetwork(int ranks, const NetworkOptions& options);
  ~SimulatedNetwork();
  SimulatedNetwork(const SimulatedNetwork&) = delete;
  SimulatedNetwork& operator=(const SimulatedNetwork&) = delete;

  int ranks() const;
  const NetworkOptions& options() const;

 private:
  friend class SimulatedCommunicator;
  std::shared_ptr<internal::SimulatedHub> hub_;
};

// Decorator over the communicators of ranks that are threads of one process (local.h). Data moves
// as the inner communicator moves it; beside that every rank has a virtual clock, shared by all its
// communicators:
//   - between calls it advances by the processor time of the rank's thread (kCpuTime), or by what
//     Computed reports (kModelled). The time inside calls does not count
//   - issuing an operation reads it
//   - Work::Wait sets it to the arrival that NetworkTimer gives, unless it is later already; the
//     difference is exposed time. Barrier waits as well. Split takes no time
// An operation is timed when all ranks of its communicator have issued it, with the times at which
// they did, so it does not matter which thread runs when: with kModelled all times repeat bit for
// bit. That is also why Wait returns only when all ranks have issued the operation, whether or not
// it needs them.
//
// Done and CompletedFraction are those of the inner operation and say nothing about the clock: a
// program that polls instead of waiting is not timed.
//
// Errors   PeerFailed when a rank has ended without an operation that this one waits for; those of
//          the inner communicator
class SimulatedCommunicator : public Communicator {
 public:
  // Rank r of `inner` is rank r of the network, and all ranks join it once. Does not own `inner`.
  SimulatedCommunicator(Communicator& inner, SimulatedNetwork& network);
  ~SimulatedCommunicator() override;

  // Of this rank since the start or ResetClocks.
  double now_s();
  double compute_s();
  double exposed_s();
  // All clocks and ports of the network start again at 0. Collective over the whole network, while
  // nothing is pending; takes no time.
  void ResetClocks();

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
  void Progress() override;
  void Computed(double flops) override;
  Traffic SetTraffic(Traffic traffic) override { return inner_->SetTraffic(traffic); }
  void SetTimeout(double seconds) override;
  std::unique_ptr<Communicator> Split(int color, int key) override;
  [[noreturn]] void Abort(const std::string& reason) override;

 private:
  SimulatedCommunicator(std::unique_ptr<Communicator> inner,
                        std::shared_ptr<internal::SimulatedHub> hub,
                        std::shared_ptr<internal::SimulatedGroup> group,
                        std::shared_ptr<internal::SimulatedRank> me);
  template <class F>
  Work Issue(CommOp op, int64_t bytes, std::vector<NetworkMessage> sends, F&& issue);

  std::unique_ptr<Communicator> owned_;
  Communicator* inner_;
  std::shared_ptr<internal::SimulatedHub> hub_;
  std::shared_ptr<internal::SimulatedGroup> group_;
  std::shared_ptr<internal::SimulatedRank> me_;
  int64_t sequence_ = 0, splits_ = 0;  // of this communicator; the same on every rank
};

}  // namespace longspan::parallel
