#include "parallel/comm/bootstrap.h"

#include <mpi.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

#include "ops/core/cuda/backend.h"
#include "ops/core/parallel_for.h"
#include "parallel/comm/mpi_engine.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/peer_watch.h"
#include "parallel/comm/self.h"

namespace longspan::parallel {
namespace {

// How a launcher tells its processes that they are ranks, and of how many (absent: it does not).
constexpr const char* kRankVariables[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"};
constexpr const char* kSizeVariables[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};

std::optional<int> Integer(const char* name) {
  const auto text = Environment(name);
  if (!text) return std::nullopt;
  int value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || end != text->data() + text->size()) return std::nullopt;
  return value;
}

template <size_t N>
std::optional<int> FirstInteger(const char* const (&names)[N]) {
  for (const char* name : names) {
    if (const auto value = Integer(name)) return value;
  }
  return std::nullopt;
}

// A rank must not outlive its launcher: without it nobody would end the job.
void EndWithLauncher() {
  const pid_t parent = getppid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) raise(SIGKILL);  // it ended before the request took effect
}

int ThreadsOfRank(int local_size) {
  if (const auto threads = Integer("OMP_NUM_THREADS")) return std::max(1, *threads);
  const int cores = AvailableCores();
  const bool bound = cores < static_cast<int>(std::thread::hardware_concurrency());
  return bound && local_size > 1 ? cores : std::max(1, cores / local_size);
}

// Initialises MPI and checks that it is the one the launcher speaks of. All ranks see the same
// failures, so each can leave through MPI_Finalize.
void StartMpi(std::optional<int> announced_size) {
  int initialized = 0;
  MPI_Initialized(&initialized);
  LONGSPAN_CHECK(!initialized) << "Bootstrap::Start is called once per process";
  EndWithLauncher();
  int provided = MPI_THREAD_SINGLE, size = 0;
  internal::CheckMpi(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided),
                     "MPI_Init_thread");
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (provided < MPI_THREAD_MULTIPLE) {
    MPI_Finalize();
    throw CommError(
        "this MPI library does not support MPI_THREAD_MULTIPLE; use one that is built with thread "
        "support (Debian: openmpi-bin, libopenmpi-dev)");
  }
  if (announced_size && *announced_size != size) {
    MPI_Finalize();
    throw CommError(Str("the launcher announced ", *announced_size,
                        " ranks but the MPI library sees ", size,
                        ": start the job with the mpirun of the MPI library that longspan is built "
                        "with (launch/mpirun.sh)"));
  }
}

// Watches the processes of the other ranks on this node.
std::shared_ptr<internal::PeerWatch> WatchPeers(MPI_Comm node, int local_rank, int local_size) {
  struct Me {
    int64_t rank, process;
  } me{0, getpid()};
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  me.rank = rank;
  std::vector<Me> all(static_cast<size_t>(local_size));
  internal::CheckMpi(MPI_Allgather(&me, 2, MPI_INT64_T, all.data(), 2, MPI_INT64_T, node),
                     "MPI_Allgather");
  std::vector<internal::PeerWatch::Peer> peers;
  for (int r = 0; r < local_size; ++r) {
    const Me& peer = all[static_cast<size_t>(r)];
    if (r == local_rank) continue;
    peers.push_back({static_cast<int>(peer.rank), static_cast<pid_t>(peer.process)});
  }
  return std::make_shared<internal::PeerWatch>(rank, std::move(peers));
}

}  // namespace

std::optional<std::string> Environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) return std::nullopt;
  return std::string(value);
}

void SetEnvironmentDefault(const char* name, const char* value) {
  setenv(name, value, /*overwrite=*/0);
}

bool StdoutIsTerminal() {
  if (const auto outer = Integer("LONGSPAN_TERMINAL")) return *outer != 0;
  return isatty(STDOUT_FILENO) != 0;
}

std::unique_ptr<Bootstrap> Bootstrap::Start(MpiOptions options) {
  std::unique_ptr<Bootstrap> job(new Bootstrap);
  job->exceptions_at_start_ = std::uncaught_exceptions();
  if (const auto rendezvous = RendezvousFrom(Environment)) {
    job->Meet(*rendezvous);
  } else if (FirstInteger(kSizeVariables) || FirstInteger(kRankVariables)) {
    job->StartMpiWorld(options);
  } else {
    job->world_ = std::make_unique<SelfCommunicator>();
  }
  job->threads_ = ThreadsOfRank(job->local_size_);
  return job;
}

void Bootstrap::StartMpiWorld(MpiOptions options) {
  StartMpi(FirstInteger(kSizeVariables));
  launched_ = mpi_ = true;
  MPI_Comm node;
  internal::CheckMpi(
      MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node),
      "MPI_Comm_split_type");
  MPI_Comm_rank(node, &local_rank_);
  MPI_Comm_size(node, &local_size_);
  peers_ = WatchPeers(node, local_rank_, local_size_);
  MPI_Comm_free(&node);
  if (!options.foreign_failure) {
    options.foreign_failure = [peers = peers_] { return peers->Failure(); };
  }
  world_ = internal::MakeMpiWorld(options);
}

void Bootstrap::Meet(const Rendezvous& rendezvous) {
  const NcclOptions defaults;
  if (!NcclBuiltIn()) {
    throw Unsupported(
        "LONGSPAN_RENDEZVOUS starts ranks over NCCL, which is not built into this binary; start "
        "them with mpirun (launch/mpirun.sh)");
  }
  std::string why;
  const int gpus = cuda::DeviceCount(&why);
  if (gpus == 0) {
    throw CudaError(Str("LONGSPAN_RENDEZVOUS starts ranks over NCCL, which need a GPU each, and ",
                        "none can be used: ", why, "; start CPU ranks with mpirun"));
  }
  // With one visible GPU it may be another one for each rank; with a host name for NCCL, sharing
  // is wanted.
  if (gpus > 1 && rendezvous.least_local_size > gpus && !Environment("NCCL_HOSTID")) {
    throw CudaError(Str("LONGSPAN_RENDEZVOUS starts ranks over NCCL, which need a GPU each: this ",
                        "node has ", gpus, " for its ", rendezvous.least_local_size,
                        " ranks; start at most that many on a node"));
  }
  local_rank_ = rendezvous.local_rank;
  local_size_ = rendezvous.local_size;
  auto runtime = cuda::MakeRuntime(local_rank_ % gpus, /*sync_checks=*/false);
  RepeatNcclSums();  // before the configuration is read, which may not need it
  std::string id;
  if (rendezvous.rank == 0) {
    id = MakeNcclId();
    PublishId(rendezvous, id);
  } else {
    id = AwaitId(rendezvous, defaults.connect_timeout_s);
  }
  NcclOptions options;
  options.publish_failure = [rendezvous](const std::string& reason) {
    PublishFailure(rendezvous, reason);
  };
  options.foreign_failure = [rendezvous] { return PublishedFailure(rendezvous); };
  world_ = MakeNccl(id, rendezvous.rank, rendezvous.size, std::move(runtime), options);
  launched_ = true;
  world_->Barrier();
  if (rendezvous.rank == 0) Retire(rendezvous);
}

Bootstrap::~Bootstrap() {
  if (!launched_ || finished_ || world_ == nullptr) return;
  if (std::uncaught_exceptions() > exceptions_at_start_) {
    world_->Abort("an exception ended this rank");
  }
  world_.reset();
  if (mpi_) EndMpi();
}

// No rank ends while another one still watches it.
int Bootstrap::EndMpi() {
  if (peers_ != nullptr) peers_->Stop();
  MPI_Barrier(MPI_COMM_WORLD);
  return MPI_Finalize();
}

void Bootstrap::Finish() {
  if (!launched_ || finished_) return;
  finished_ = true;
  if (mpi_) {
    internal::CheckMpi(EndMpi(), "MPI_Finalize");
  } else {
    world_->Barrier();  // so that no rank takes another's end for a failure
  }
}

}  // namespace longspan::parallel
