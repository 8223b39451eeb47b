#pragma once
#include <functional>
#include <optional>
#include <string>

namespace longspan::parallel {

// How ranks without MPI find each other: through a file that all of them can read.
//
//   LONGSPAN_RENDEZVOUS   a file, or a folder that gets one file per job; on several nodes it is on
//                         a file system that they share
//   LONGSPAN_RANK, LONGSPAN_WORLD_SIZE      else SLURM_PROCID, SLURM_NTASKS
//   LONGSPAN_LOCAL_RANK                     else SLURM_LOCALID, else the rank
//   LONGSPAN_LOCAL_SIZE                     else SLURM_NTASKS_PER_NODE, else the number of ranks
//   LONGSPAN_JOB_ID       differs between jobs; else SLURM_JOB_ID, SLURM_STEP_ID and
//                         SLURM_RESTART_COUNT together
// Slurm's variables alone start nothing: they are also set in a batch script's own shell.
struct Rendezvous {
  std::string file;    // of this job
  std::string job_id;  // what a file of another job is told apart by
  int rank = 0, size = 1;
  int local_rank = 0, local_size = 1;
  int least_local_size = 1;  // ranks of this node that the variables tell of, at least
};

// None without LONGSPAN_RENDEZVOUS. `variable` gives the value of an environment variable.
// Errors: CommError naming the variable that is missing or wrong.
using Variables = std::function<std::optional<std::string>(const char* name)>;
std::optional<Rendezvous> RendezvousFrom(const Variables& variable);

// Rank 0 hands `id` (any bytes) to the others. The file appears whole or not at all.
// Errors: CommError when the file cannot be written, or is one of this job already: then the job id
// is not new, and others may have read the old one.
void PublishId(const Rendezvous& rendezvous, const std::string& id);
// Waits for PublishId of the same job and size; a file of another job counts as none.
// Errors: CommError after `timeout_s`, naming the file and, if one is there, its job.
std::string AwaitId(const Rendezvous& rendezvous, double timeout_s);
// Rank 0, when all ranks have met: removes the file.
void Retire(const Rendezvous& rendezvous) noexcept;

// A failure that the others cannot learn from the transport, which may be stuck itself: a file
// beside the rendezvous. Peers look for it now and then. The first reason stays.
void PublishFailure(const Rendezvous& rendezvous, const std::string& reason) noexcept;
std::optional<std::string> PublishedFailure(const Rendezvous& rendezvous) noexcept;

}  // namespace longspan::parallel
