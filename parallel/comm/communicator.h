#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/core/dtype.h"
#include "ops/core/tensor.h"

namespace longspan::cuda {
class Runtime;
}

namespace longspan::parallel {

enum class ReduceOp { kSum, kMax, kMin };

// How long a rank waits for the others before it takes the job for stuck: longer than any rank
// works alone, such as on its part of a checkpoint.
inline constexpr double kDefaultTimeoutS = 1800;

// What operations move: operands of the model and their gradients, those of context-parallel
// attention by strategy, or what ranks tell each other about them (block summaries, requests,
// fingerprints of plans).
enum class Traffic : uint8_t {
  kPayload,
  kControl,
  kRing,
  kDoubleRing,
  kAllGather,
  kUlysses,
  kHybrid,
  kExchange,
  kRouted,
};
inline constexpr size_t kTraffics = 9;

// A pending operation. Its buffers must stay alive and untouched until Done() is true or Wait()
// returns (send buffers may be read). A default-constructed Work is complete. Dropping a Work that
// is not complete is an error: `local` fails the group, `mpi` and `nccl` log it.
//
// Of an operation on tensors in GPU memory, Wait() makes the compute stream wait: work given to
// that stream later sees the result and may reuse the buffers, and the host goes on at once. Done()
// is true when the device is through with it. The Work keeps the tensors alive until then.
class Work {
 public:
  class State {  // one per implementation
   public:
    virtual ~State() = default;
    virtual bool Done() = 0;  // makes progress, does not block; throws CommError on failure
    virtual void Wait() = 0;  // as Work::Wait; throws CommError when the operation failed
    // Share of the operation's pieces that have arrived, in [0, 1]; makes no progress itself.
    virtual double CompletedFraction() const = 0;
  };
  Work() = default;
  explicit Work(std::shared_ptr<State> state) : state_(std::move(state)) {}
  bool Done() { return state_ == nullptr || state_->Done(); }
  void Wait() {
    if (state_ != nullptr) state_->Wait();
    state_.reset();
  }
  double CompletedFraction() const { return state_ == nullptr ? 1.0 : state_->CompletedFraction(); }

 private:
  std::shared_ptr<State> state_;
};

// One message of a grouped exchange; messages of zero bytes are skipped on both sides. `owner` is
// the tensor that holds the bytes: needed in GPU memory, unused for host memory.
struct Send {
  int peer;
  const void* data;
  int64_t bytes;
  Tensor owner{};
};
struct Recv {
  int peer;
  void* data;
  int64_t bytes;
  Tensor owner{};
};
// A whole tensor as one message.
inline Send SendOf(int peer, const Tensor& t) {
  return {peer, t.raw(), static_cast<int64_t>(t.bytes()), t};
}
inline Recv RecvInto(int peer, const Tensor& t) {
  return {peer, t.raw(), static_cast<int64_t>(t.bytes()), t};
}

// A group of ranks that exchange tensors in host memory, and in the memory of the rank's GPU once
// UseDevice has named it.
//
// All collectives are asynchronous: they return a Work and move while any thread of the rank is
// inside Done, Wait or Progress of this communicator or of one related to it by Split. Every rank
// must issue the same operations in the same order, Exchange and Split included (a rank without
// messages calls Exchange with empty lists), on operands of the same kind of device. An operation
// on GPU tensors starts when the compute stream has done what it was given before, on a stream of
// its own with high priority: kernels given to the compute stream between an operation and its
// Wait() run beside the transfer. Reductions have a fixed order for a given size and
// layout and give the same bits on every rank, so a run repeats bit for bit (for `nccl` see below).
//
// Threads   one thread of a rank at a time uses a Communicator; different communicators of a
//           process may be used from different threads
// Dtypes    reductions: f32, f64, i32, i64 (bf16 is refused: reduce in f32); max and min of NaN are
//           unspecified, so agree on a flag instead. Other collectives move any dtype
// Errors    InvalidArgument for bad arguments, before anything is issued; CommError for transport
//           failures and for a peer that failed
// Devices   cpu; cuda with these differences:
//             self   copies on the compute stream itself
//             local  all ranks on one GPU. Issuing never blocks; Wait and Split block the host
//                    until the peers have issued the operation. Sums add ranks 0, 1, ... in order
//             mpi    through pinned host memory: issuing blocks the host until the operands are
//                    there, Wait until the results are back on their way to the GPU
//             nccl   the first operations of a pair of ranks block the host while they connect.
//                    Sums have NCCL's order, which depends on its choice of algorithm: the same
//                    bits on every rank, and in every run with the same NCCL, GPUs and settings
//                    unless switches add them up (NcclOptions::deterministic)
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string name() const = 0;  // "self", "local", "mpi", ...

  // In place: on every rank `t` becomes the element-wise reduction over ranks.
  virtual Work AllReduce(Tensor t, ReduceOp op) = 0;
  // out [size * n, ...] receives in [n, ...] of rank r at rows [r * n, (r + 1) * n). `in` may be
  // the rows of `out` that belong to this rank; any other overlap is refused.
  virtual Work AllGather(Tensor in, Tensor out) = 0;
  // in [size * n, ...]; out [n, ...] receives the sum over ranks of rows [rank * n, (rank + 1) *
  // n). The tensors may not overlap. `in` is only read.
  virtual Work ReduceScatter(Tensor in, Tensor out) = 0;
  // `t` of rank `root` is copied to every rank.
  virtual Work Broadcast(Tensor t, int root) = 0;
  // All sends and receives of one step in one call, so that no order of ranks can deadlock. The
  // n-th Exchange of one rank meets the n-th of its peers; in it, the messages between a pair of
  // ranks match in list order and must have equal sizes. A rank may send to itself. Receives may
  // not overlap each other, nor, in GPU memory, a send; a message to itself may stay where it is.
  virtual Work Exchange(std::vector<Send> sends, std::vector<Recv> recvs) = 0;
  virtual void Barrier() = 0;

  // From here on tensors of this GPU may be used, in the order of `runtime`'s stream; communicators
  // made by Split later do the same. Not collective. May be called again with another runtime of
  // the same GPU, when nothing is pending. Does nothing with a null pointer (a Context on the CPU).
  virtual void UseDevice(std::shared_ptr<cuda::Runtime> runtime) = 0;

  // Moves pending operations; cheap when there are none. Kernels call it between tasks. Never
  // throws: a failure shows in Done or Wait.
  virtual void Progress() = 0;

  // The caller has given `flops` floating-point operations to this rank's processor. Communicators
  // that simulate time (simulated.h) count them, to the others it is nothing.
  virtual void Computed(double /*flops*/) {}

  // From here on operations of this communicator are of this kind; returns the former one.
  // Communicators that count (counting.h) tell the two apart, to the others it is nothing. Not
  // collective. See ControlTraffic.
  virtual Traffic SetTraffic(Traffic /*traffic*/) { return Traffic::kPayload; }

  // From here on operations of this communicator and of all related to it by Split may take this
  // many seconds; 0: no limit. One that takes longer fails with CommError naming the operation,
  // this rank and, where known, the ranks that are missing. Not collective, but the same on all
  // ranks. `self` waits for nobody.
  virtual void SetTimeout(double seconds) = 0;

  // Collective. Ranks with equal `color` (>= 0) form a new group, ordered by (key, rank).
  // A rank with a negative color belongs to none and gets nullptr.
  virtual std::unique_ptr<Communicator> Split(int color, int key) = 0;

  // Ends the job of all ranks at once after a failure of this rank only; does not return. `mpi`
  // and `nccl` end the processes with exit code 3. `local` marks the group (and all groups related
  // to it by Split) failed: every pending and later call on it throws CommError, and so does this
  // call. `self` has nobody else to end: it only throws CommError.
  [[noreturn]] virtual void Abort(const std::string& reason) = 0;
};

// Operations of `comm` that are issued while this lives are of this kind.
class TrafficScope {
 public:
  TrafficScope(Communicator& comm, Traffic traffic)
      : comm_(comm), former_(comm.SetTraffic(traffic)) {}
  ~TrafficScope() { comm_.SetTraffic(former_); }
  TrafficScope(const TrafficScope&) = delete;
  TrafficScope& operator=(const TrafficScope&) = delete;

 private:
  Communicator& comm_;
  const Traffic former_;
};
class ControlTraffic : public TrafficScope {
 public:
  explicit ControlTraffic(Communicator& comm) : TrafficScope(comm, Traffic::kControl) {}
};

// Blocking helpers on single host values, for agreement between ranks.
int64_t AllReduceValue(Communicator& comm, int64_t value, ReduceOp op);
double AllReduceValue(Communicator& comm, double value, ReduceOp op);
// Returns rank `root`'s bytes on every rank.
std::string BroadcastString(Communicator& comm, const std::string& text, int root);
// The `error` of the lowest rank whose text is not empty, on every rank; empty when no rank has
// one: ranks that check something locally use it to leave together.
std::string FirstError(Communicator& comm, const std::string& error);

}  // namespace longspan::parallel
