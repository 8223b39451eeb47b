#pragma once
#include <functional>
#include <string>

#include "parallel/comm/bootstrap.h"

namespace longspan::launch {

// Runs `body` as one rank of a job and turns its outcome into an exit code:
//   0  success
//   2  every rank failed: one prints its error (rank 0, unless its own is that another rank did not
//      answer and that rank knows why), all leave through the communicator's clean end
//   3  only some ranks failed: after waiting a few seconds for the others, a failed rank prints its
//      error and ends the whole job
int RunSession(const std::function<void(parallel::Bootstrap&)>& body);

// One rank as commands see it: a process of a job, or a thread of this process.
struct Rank {
  parallel::Communicator& world;
  int local_rank = 0, local_size = 1;  // among the ranks of this node
  int threads = 1;                     // of the host, for this rank
  bool is_thread = false;
};

// Neighbouring ranks that share a node, as DeviceMesh takes it: 1 when nodes have different numbers
// of ranks. Collective.
int NodeRanks(const Rank& rank);

// The same with `body` called for each rank of this process: once, or with local_ranks > 0 on that
// many threads, which are then the whole job. The first error of a thread is the job's.
//
// Errors    ConfigError: local_ranks in a job that a launcher started
int RunRanks(int local_ranks, const std::function<void(const Rank&)>& body);

}  // namespace longspan::launch
