#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "parallel/comm/comm_op.h"

// How long transfers take on a network that exists on paper: the rules of the simulated
// communicator (simulated.h) and of forecasts (parallel/context/predict.h). All times in seconds.
namespace longspan::parallel {

// A message of n bytes takes latency_s + n / bytes_per_s where nothing is in its way.
struct LinkOptions {
  double latency_s = 0;    // from 0
  double bytes_per_s = 0;  // of one rank's port, in each direction; above 0
};

// What advances the clock of a rank between operations.
enum class ComputeClock {
  kCpuTime,   // the processor time of its thread, so one thread a rank
  kModelled,  // Communicator::Computed at flops_per_s: the same in every run
};

// A cluster of nodes with `ranks_per_node` consecutive ranks each.
struct NetworkOptions {
  LinkOptions intra{}, inter{};  // between ranks of one node; of two nodes, unused with one node
  int ranks_per_node = 0;        // 0: all ranks are on one node
  ComputeClock compute = ComputeClock::kModelled;
  double flops_per_s = 0;  // of one rank; above 0 where compute is kModelled
};
// Errors: InvalidArgument naming the field and its value.
void CheckNetwork(const NetworkOptions& options);

// The clock of one rank.
struct RankClock {
  double now_s = 0;
  double compute_s = 0;  // of it, computing
  double exposed_s = 0;  // of it, waiting for transfers

  void Compute(double seconds) {
    now_s += seconds;
    compute_s += seconds;
  }
  void WaitUntil(double arrival_s) {
    if (arrival_s <= now_s) return;
    exposed_s += arrival_s - now_s;
    now_s = arrival_s;
  }
};

struct NetworkMessage {
  int peer = 0;
  int64_t bytes = 0;
};

// Times the operations of one communicator, in the order in which its ranks issue them.
//
// Every rank has an outgoing and an incoming port for its own node, and two more for other nodes.
// The messages of one rank use its outgoing port in list order, those of one operation to one rank
// its incoming port in the order of (start, sender, place in the sender's list):
//   start   = max(the sender has issued the operation, its outgoing port is free)
//   arrival = max(start + latency, the receiver's incoming port is free) + bytes / rate
// An outgoing port is free again at start + bytes / rate, an incoming one at the arrival, so that P
// senders to one rank share its rate. Nobody waits for the receiver to issue the operation.
// Messages to oneself and of zero bytes take no time.
//
// Collectives begin when all P ranks have issued them and the ports of the links they use are free,
// and end on all ranks at once. They use the links of a ring of the ranks in their order; with its
// largest latency L and its smallest rate R, and `bytes` of the operand as given below:
//   AllReduce      2 (P - 1) (L + bytes / (P R))     the tensor
//   AllGather        (P - 1) (L + bytes / R)         the part of one rank
//   ReduceScatter    (P - 1) (L + bytes / R)         the part of one rank
//   Broadcast        (P - 1) L + bytes / R           the tensor, in pieces
//   Barrier        2 (P - 1) L
//
// Ports remember until when they are busy from one operation to the next. Other communicators,
// those of the same ranks included, have ports of their own: the order of operations of different
// communicators depends on the threads, and results must not.
//
// Threads   none of its own; one caller at a time
class NetworkTimer {
 public:
  // `world_ranks`: of the ranks of the communicator; they decide who shares a node.
  NetworkTimer(const NetworkOptions& options, std::vector<int> world_ranks);

  int size() const { return static_cast<int>(world_ranks_.size()); }

  // One Exchange, issued by rank r at ready[r] with sends[r]. Returns for every rank when the last
  // message to it arrives, ready[r] where there is none. Peers are ranks of the communicator.
  std::vector<double> Exchange(std::span<const double> ready,
                               std::span<const std::vector<NetworkMessage>> sends);
  // AllReduce, AllGather, ReduceScatter, Broadcast or Barrier. Returns when it ends.
  double Collective(CommOp op, int64_t bytes, std::span<const double> ready);
  // All ports are free, as in the beginning.
  void Reset();

 private:
  enum Class { kIntra, kInter, kClasses };
  struct Inbound {
    double start_s;
    int64_t bytes;
  };

  int NodeOf(int rank) const;
  Class Between(int a, int b) const { return NodeOf(a) == NodeOf(b) ? kIntra : kInter; }
  const LinkOptions& Link(Class c) const { return c == kIntra ? options_.intra : options_.inter; }
  size_t Port(int rank, Class c) const { return static_cast<size_t>(rank) * kClasses + c; }

  const NetworkOptions options_;
  const std::vector<int> world_ranks_;
  std::vector<double> out_free_s_, in_free_s_;  // by Port
  std::vector<std::vector<Inbound>> inbound_;   // by Port, scratch of Exchange
};

}  // namespace longspan::parallel
