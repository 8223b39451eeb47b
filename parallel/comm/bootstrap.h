#pragma once
#include <memory>
#include <optional>
#include <string>

#include "parallel/comm/communicator.h"
#include "parallel/comm/mpi.h"
#include "parallel/comm/rendezvous.h"

namespace longspan::parallel {

namespace internal {
class PeerWatch;
}

// What the process learns from its launcher:
//   - LONGSPAN_RENDEZVOUS (rendezvous.h): ranks with a GPU each and no MPI. world() is NCCL, with
//     sums that repeat bit for bit unless the user chose otherwise (nccl.h), on GPU local_rank()
//     modulo the visible ones; UseDevice may later name another Runtime of that GPU
//   - mpirun, or srun with an MPI plugin: world() is MPI, the only case in which MPI is
//   initialised.
//     The ranks of a node watch each other's processes: when one ends early, every wait of the
//     others throws CommError that names it
//   - neither: one rank, `self`
//
//   auto job = Bootstrap::Start();
//   const int status = Command(job->world());  // catches what all ranks found: message, status 2
//   job->Finish();                             // an exception that gets here first: Abort, status
//   3 return status;
//
// Errors   CommError naming the environment variable that is missing or wrong, when not all ranks
//          come to a rendezvous in time, when MPI lacks
//          MPI_THREAD_MULTIPLE, or when the launcher announced another number of ranks than the MPI
//          library sees (they belong to different MPIs). Unsupported for a rendezvous in a binary
//          without NCCL, CudaError for one without a GPU or with more ranks on a node than GPUs
class Bootstrap {
 public:
  // Once per process.
  static std::unique_ptr<Bootstrap> Start(MpiOptions options = {});

  // Finishes a clean run; while an exception unwinds it aborts the job of several ranks instead,
  // because MPI_Finalize would wait for ranks that do not come.
  ~Bootstrap();
  Bootstrap(const Bootstrap&) = delete;
  Bootstrap& operator=(const Bootstrap&) = delete;

  Communicator& world() { return *world_; }
  int rank() const { return world_->rank(); }
  int size() const { return world_->size(); }
  int local_rank() const { return local_rank_; }  // among the ranks of this node
  int local_size() const { return local_size_; }
  bool launched() const { return launched_; }
  // Host threads this rank should use: OMP_NUM_THREADS when set; else the cores it is bound to;
  // else its share of the node's cores. At least 1.
  int threads() const { return threads_; }

  // Collective: ends MPI or NCCL. All works must be complete; communicators made from world() may
  // be destroyed later but not used.
  void Finish();

 private:
  Bootstrap() = default;
  void StartMpiWorld(MpiOptions options);
  int EndMpi();
  void Meet(const Rendezvous& rendezvous);  // NCCL

  std::shared_ptr<internal::PeerWatch> peers_;  // on this node, with MPI
  std::unique_ptr<Communicator> world_;
  bool mpi_ = false;
  int local_rank_ = 0, local_size_ = 1, threads_ = 1;
  bool launched_ = false, finished_ = false;
  int exceptions_at_start_ = 0;
};

// Whether people read standard output in a terminal. Under mpirun every rank writes to a terminal
// that mpirun makes, so launch/mpirun.sh passes on what its own output is (LONGSPAN_TERMINAL).
bool StdoutIsTerminal();

// The value of an environment variable. Every access to the environment goes through these two.
std::optional<std::string> Environment(const char* name);
// Sets a variable that is not set, for libraries that read it later. Not while other threads may
// read the environment.
void SetEnvironmentDefault(const char* name, const char* value);

}  // namespace longspan::parallel
