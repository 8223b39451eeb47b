#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "parallel/comm/comm_op.h"
#include "parallel/comm/communicator.h"

namespace longspan::parallel {

// Calls and payload bytes that this rank sends to other ranks. P = group size; the share of one
// rank in a bandwidth-optimal algorithm, whatever the transport does:
//   AllReduce       2 * (P - 1) * bytes(t) / P, rounded down
//   AllGather       (P - 1) * bytes(in)
//   ReduceScatter   (P - 1) * bytes(out)
//   Broadcast       root: (P - 1) * bytes(t); others 0
//   Exchange        the sum of its sends to other ranks (a message to itself sends nothing)
//   Barrier, Split  0
struct CommCount {
  int64_t calls = 0;
  int64_t bytes = 0;
};
struct CommCounts {
  std::array<CommCount, kCommOps> ops{};      // payload (Traffic)
  CommCount control;                          // all operations of Traffic::kControl
  std::array<int64_t, kTraffics> bytes_of{};  // by Traffic, of all of them
  const CommCount& operator[](CommOp op) const { return ops[static_cast<size_t>(op)]; }
  CommCount Total() const;  // of the payload
};

namespace internal {
class CommLedger;
}

// Decorator that counts what passes through and remembers the last operations. Communicators made
// by its Split count for themselves and for every ancestor. When an operation fails with CommError,
// the remembered operations are logged, so that a time-out shows where each rank stands.
class CountingCommunicator : public Communicator {
 public:
  static constexpr int kRecentOperations = 32;

  explicit CountingCommunicator(std::unique_ptr<Communicator> inner);
  // Does not own `inner`, which must outlive it.
  explicit CountingCommunicator(Communicator& inner);

  // Counts of this communicator and all made from it by Split, since the start or ResetCounts.
  // Threads: may be called while other threads use the communicators.
  CommCounts counts() const;
  void ResetCounts();
  // The last operations, oldest first: "#17 Exchange: 3 sends of 98304 bytes, pending for 2.5 s".
  std::vector<std::string> RecentOperations() const;

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
  Traffic SetTraffic(Traffic traffic) override {
    inner_->SetTraffic(traffic);
    return std::exchange(traffic_, traffic);
  }
  void SetTimeout(double seconds) override { inner_->SetTimeout(seconds); }
  std::unique_ptr<Communicator> Split(int color, int key) override;
  [[noreturn]] void Abort(const std::string& reason) override;

 private:
  CountingCommunicator(std::unique_ptr<Communicator> inner,
                       std::shared_ptr<internal::CommLedger> parent);

  std::unique_ptr<Communicator> owned_;
  Communicator* inner_;
  std::shared_ptr<internal::CommLedger> ledger_;
  Traffic traffic_ = Traffic::kPayload;
};

}  // namespace longspan::parallel
