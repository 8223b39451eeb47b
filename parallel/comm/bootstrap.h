#pragma once
#include <memory>
#include <optional>
#include <string>

#include "parallel/comm/communicator.h"
#include "parallel/comm/mpi.h"

namespace longspan::parallel {

// What the process learns from its launcher. MPI is initialised only when a launcher (mpirun,
// srun) started the process; a plain run gets the `self` communicator and makes no MPI call.
//
//   auto job = Bootstrap::Start();
//   const int status = Command(job->world());  // catches what all ranks found: message, status 2
//   job->Finish();                             // an exception that gets here first: Abort, status
//   3 return status;
//
// Errors   CommError when MPI lacks MPI_THREAD_MULTIPLE, or when the launcher announced another
//          number of ranks than the MPI library sees (they belong to different MPIs)
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

  // Collective: ends MPI. All works must be complete; communicators made from world() may be
  // destroyed later but not used.
  void Finish();

 private:
  Bootstrap() = default;

  std::unique_ptr<Communicator> world_;
  int local_rank_ = 0, local_size_ = 1, threads_ = 1;
  bool launched_ = false, finished_ = false;
  int exceptions_at_start_ = 0;
};

// Whether people read standard output in a terminal. Under mpirun every rank writes to a terminal
// that mpirun makes, so launch/mpirun.sh passes on what its own output is (LONGSPAN_TERMINAL).
bool StdoutIsTerminal();

// The value of an environment variable. Every read of the environment goes through here.
std::optional<std::string> Environment(const char* name);

}  // namespace longspan::parallel
