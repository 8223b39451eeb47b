#pragma once
#include <mpi.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ops/core/tensor.h"
#include "parallel/comm/communicator.h"
#include "parallel/comm/device_queue.h"
#include "parallel/comm/mpi_inquiry.h"

// Progress of all MPI requests of a process. Only parallel/comm/mpi*.cpp and bootstrap.cpp include
// this header, so mpi.h stays out of everything else.
namespace longspan::parallel::internal {

// Throws CommError with MPI's own text when `code` is not MPI_SUCCESS.
void CheckMpi(int code, const char* call);

class MpiState;

// Owns every outstanding request. One MPI_Testsome over all of them serves Progress, Done and Wait
// of all communicators, so whoever polls moves everything.
class MpiEngine {
 public:
  using ForeignFailure = std::function<std::optional<std::string>()>;
  MpiEngine(int64_t piece_bytes, double timeout_s, ForeignFailure foreign_failure)
      : piece_bytes_(piece_bytes),
        foreign_failure_(std::move(foreign_failure)),
        timeout_s_(timeout_s) {}

  // Messages are cut into pieces of at most this size: bounded counts, bounded time in one poll.
  int64_t piece_bytes() const { return piece_bytes_; }

  // Takes over a started request of `state`. `expected_bytes` >= 0: a receive that must have
  // exactly this size. `then`, if any, runs when the request has succeeded, on the thread that
  // finds out; it must be short and may not use MPI. `peer` >= 0: the only other rank that takes
  // part, by its number in the job.
  void Add(const std::shared_ptr<MpiState>& state, MPI_Request request, int64_t expected_bytes = -1,
           std::function<void()> then = nullptr, int peer = -1);
  void Progress() noexcept;  // one poll when something is outstanding
  bool Done(const MpiState& state);
  void Wait(const MpiState& state);
  void SetTimeout(double seconds) { timeout_s_ = seconds; }
  MpiInquiry& inquiry() { return inquiry_; }
  int64_t outstanding() const { return outstanding_.load(std::memory_order_relaxed); }

 private:
  struct Owner {
    std::shared_ptr<MpiState> state;
    int64_t expected_bytes;
    std::function<void()> then;
    int peer;
  };
  bool Poll();  // true when something completed
  std::string Missing(const MpiState& state);
  void Complete(size_t index, const MPI_Status& status, bool failed);

  const int64_t piece_bytes_;
  const ForeignFailure foreign_failure_;
  std::atomic<double> timeout_s_;
  std::mutex mutex_;
  std::vector<MPI_Request> requests_;
  std::vector<Owner> owners_;  // of requests_
  std::vector<int> indices_;   // scratch of Poll
  std::vector<MPI_Status> statuses_;
  std::atomic<int64_t> outstanding_{0};
  MpiInquiry inquiry_;
  std::atomic<uint32_t> unfinished_polls_{0};
};

// One operation. Keeps its tensors alive until its last request is complete, even when the Work is
// dropped; raw buffers of an Exchange are the caller's.
class MpiState {
 public:
  MpiState(std::string description, std::vector<Tensor> tensors)
      : description_(std::move(description)), tensors_(std::move(tensors)) {}
  ~MpiState();
  MpiState(const MpiState&) = delete;
  MpiState& operator=(const MpiState&) = delete;

  bool complete() const { return finished_.load(std::memory_order_acquire) == pieces_.load(); }
  double fraction() const {
    const int64_t n = pieces_.load();
    return n == 0 ? 1.0 : static_cast<double>(finished_.load()) / static_cast<double>(n);
  }
  const std::string& description() const { return description_; }
  // Operation `sequence` of the communicator of that name, whose ranks of the job these are.
  void Identify(uint64_t name, int64_t sequence, std::shared_ptr<const std::vector<int>> ranks) {
    name_ = name, sequence_ = sequence, ranks_ = std::move(ranks);
  }

  // Operands in GPU memory: the queue that moves them, and their pinned twins.
  void Stage(std::shared_ptr<DeviceQueue> queue) { queue_ = std::move(queue); }
  void KeepTwin(std::shared_ptr<std::byte> twin) { twins_.push_back(std::move(twin)); }
  DeviceQueue* queue() const { return queue_.get(); }
  // After completion: the point of the queue at which the results are in GPU memory.
  const DeviceEventRef& DeviceEnd();
  void OrderCompute();  // the compute stream goes on after DeviceEnd

 private:
  friend class MpiEngine;
  std::string description_;
  std::vector<Tensor> tensors_;
  uint64_t name_ = 0;
  int64_t sequence_ = 0;
  std::shared_ptr<const std::vector<int>> ranks_;
  std::atomic<int64_t> pieces_{0}, finished_{0};
  std::shared_ptr<DeviceQueue> queue_;
  std::vector<std::shared_ptr<std::byte>> twins_;
  DeviceEventRef device_end_;
  bool ordered_ = false;
  std::string error_;  // written before the last increment of finished_
};

// The Work of an operation.
class MpiWork : public Work::State {
 public:
  MpiWork(std::shared_ptr<MpiEngine> engine, std::shared_ptr<MpiState> state)
      : engine_(std::move(engine)), state_(std::move(state)) {}
  ~MpiWork() override;
  bool Done() override;
  void Wait() override;
  double CompletedFraction() const override { return state_->fraction(); }

 private:
  std::shared_ptr<MpiEngine> engine_;
  std::shared_ptr<MpiState> state_;
};

}  // namespace longspan::parallel::internal
