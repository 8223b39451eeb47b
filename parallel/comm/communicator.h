#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/core/dtype.h"
#include "ops/core/tensor.h"

namespace longspan::parallel {

enum class ReduceOp { kSum, kMax, kMin };

// A pending operation. Its buffers must stay alive and, until Done() or Wait(), untouched (send
// buffers may be read). A default-constructed Work is complete.
class Work {
 public:
  class State {  // one per implementation
   public:
    virtual ~State() = default;
    virtual bool Done() = 0;  // makes progress, does not block
    virtual void Wait() = 0;  // blocks; throws CommError when the operation failed
  };
  Work() = default;
  explicit Work(std::shared_ptr<State> state) : state_(std::move(state)) {}
  bool Done() { return state_ == nullptr || state_->Done(); }
  void Wait() {
    if (state_ != nullptr) state_->Wait();
    state_.reset();
  }

 private:
  std::shared_ptr<State> state_;
};

// One message of a grouped exchange; zero bytes are skipped on both sides.
struct Send {
  int peer;
  const void* data;
  int64_t bytes;
};
struct Recv {
  int peer;
  void* data;
  int64_t bytes;
};

// A group of ranks that exchange tensors in host memory.
//
// All collectives are asynchronous: they return a Work and move while any thread of the rank is
// inside Done, Wait or Progress. Every rank must issue the same collectives in the same order, also
// between exchanges of different peers. Reductions have a fixed order for a given size and layout,
// so a run repeats bit for bit. One thread of a rank at a time uses a Communicator; different
// communicators of a process may be used from different threads.
//
// Dtypes    reductions: f32, f64, i32, i64 (sums of bf16 are refused: reduce in f32)
// Errors    InvalidArgument for bad arguments, CommError for transport failures
// Devices   cpu
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string name() const = 0;  // "self", "local", "mpi", ...

  // In place: on every rank `t` becomes the element-wise reduction over ranks.
  virtual Work AllReduce(Tensor t, ReduceOp op) = 0;
  // out [size * n, ...] receives in [n, ...] of rank r at rows [r * n, (r + 1) * n).
  virtual Work AllGather(Tensor in, Tensor out) = 0;
  // in [size * n, ...]; out [n, ...] receives the sum over ranks of rows [rank * n, (rank + 1) * n).
  virtual Work ReduceScatter(Tensor in, Tensor out) = 0;
  // `t` of rank `root` is copied to every rank.
  virtual Work Broadcast(Tensor t, int root) = 0;
  // All sends and receives of one step in one call, so that no order of ranks can deadlock. Messages
  // between a pair of ranks match in order. A rank may send to itself.
  virtual Work Exchange(std::vector<Send> sends, std::vector<Recv> recvs) = 0;
  virtual void Barrier() = 0;

  // Moves pending operations; cheap when there are none. Kernels call it between tasks.
  virtual void Progress() = 0;

  // Collective. Ranks with equal `color` (>= 0) form a new group, ordered by (key, rank).
  virtual std::unique_ptr<Communicator> Split(int color, int key) = 0;

  // Ends the job of all ranks at once after a failure of this rank only; does not return.
  // `local` marks the group failed: every pending and later call on it throws CommError.
  virtual void Abort(const std::string& reason) = 0;
};

// Blocking helpers on single host values, for agreement between ranks.
int64_t AllReduceValue(Communicator& comm, int64_t value, ReduceOp op);
double AllReduceValue(Communicator& comm, double value, ReduceOp op);
// Returns rank `root`'s bytes on every rank.
std::string BroadcastString(Communicator& comm, const std::string& text, int root);
// The `error` of the lowest rank whose text is not empty, on every rank; empty when no rank has one:
// ranks that check something locally use it to leave together.
std::string FirstError(Communicator& comm, const std::string& error);

}  // namespace longspan::parallel
