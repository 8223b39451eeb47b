#pragma once
#include <functional>
#include <memory>
#include <string>

#include "parallel/comm/communicator.h"

namespace longspan::parallel {

namespace internal {
class LocalGroup;
class LocalHub;
}  // namespace internal

struct LocalOptions {
  // A wait longer than this fails the world and names the ranks that are missing; 0 = no limit.
  double timeout_s = kDefaultTimeoutS;
};

// P ranks that live in one process as threads.
//
// Issuing an operation only posts its pointers. Once the ranks that an operation needs have posted
// it, the copies and reductions are cut into pieces that any thread inside Done, Wait or Progress
// of any rank carries out, so a waiting rank never depends on a computing one that has already
// posted. Waiting is passive (a condition variable). Reductions add ranks 0, 1, ... in order for
// each element, whoever does it.
//
// Tensors in the memory of one GPU that all ranks share (UseDevice): once the ranks have posted,
// the last of them gives the copies and sums to the ranks' streams, and nobody waits for the
// device.
//
// What ranks disagree on (another operation, size, dtype or root under the same sequence number,
// unmatched messages) fails the world: every pending and later call throws CommError with the
// first reason. So do Abort, a Work that is dropped before it is complete, and a wait for a rank
// that has left.
class LocalWorld {
 public:
  explicit LocalWorld(int ranks, LocalOptions options = {});
  ~LocalWorld();
  LocalWorld(const LocalWorld&) = delete;
  LocalWorld& operator=(const LocalWorld&) = delete;

  // The communicator of one rank, for one thread; may outlive the world object.
  std::unique_ptr<Communicator> Rank(int rank);

  // Fails the world: everybody who waits gets CommError(reason).
  void Fail(const std::string& reason);
  // Declares that `rank` issues nothing more; who waits for it gets CommError.
  void Leave(int rank);

 private:
  int ranks_;
  std::shared_ptr<internal::LocalHub> hub_;
  std::shared_ptr<internal::LocalGroup> group_;  // of all ranks
};

// The CommError of a rank that stops only because another one failed.
class PeerFailed : public CommError {
  using CommError::CommError;
};

// Runs body(communicator) on `ranks` threads and joins them. When a rank throws, the others are
// released from their waits, and the first exception that is not a PeerFailed is rethrown here.
void RunLocal(int ranks, const std::function<void(Communicator&)>& body,
              LocalOptions options = {.timeout_s = 120});

// Host threads for each of `ranks` ranks of this process: max(1, cores / ranks).
int ThreadsPerLocalRank(int ranks);

}  // namespace longspan::parallel
