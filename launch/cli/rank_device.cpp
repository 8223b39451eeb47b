#include "launch/cli/rank_device.h"

#include <unistd.h>

#include <algorithm>

#include "launch/bench/gpu_peaks.h"
#include "ops/core/cuda/backend.h"
#include "ops/core/machine.h"
#include "parallel/comm/nccl.h"
#include "trainer/agreement.h"

namespace longspan::launch {
namespace {

// What NCCL takes for one machine.
std::string HostName() {
  if (const auto name = parallel::Environment("NCCL_HOSTID")) return *name;
  char name[256] = {};
  if (gethostname(name, sizeof name - 1) != 0) return "localhost";
  return name;
}

// Counts the ranks on this rank's GPU, and refuses sharing that nobody asked for: hosts with names
// of their own are different machines to NCCL, whatever GPU they use.
int RanksOnMyGpu(const Rank& rank, const trainer::TrainOptions& options, int index,
                 const cuda::DeviceFacts& facts) {
  const std::string host = HostName();
  const auto gpus = trainer::GatherStrings(rank.world, facts.id);
  const auto hosts = trainer::GatherStrings(rank.world, host);
  const auto me = static_cast<size_t>(rank.world.rank());
  std::string error;
  for (size_t r = 0; r < gpus.size() && error.empty(); ++r) {
    if (r == me || options.backend != trainer::CommBackend::kAuto) continue;
    if (gpus[r] != gpus[me] || hosts[r] != hosts[me]) continue;
    error = Str("ranks ", std::min(r, me), " and ", std::max(r, me), " would share GPU ", index,
                " (", facts.name, ") of ", host, ", which has ", cuda::DeviceCount(),
                " for this job; start at most that many ranks on a node, or let them share with ",
                "parallel.backend: MPI");
  }
  error = parallel::FirstError(rank.world, error);
  if (!error.empty()) throw ConfigError(error);
  return static_cast<int>(std::ranges::count(gpus, gpus[me]));
}

// Refuses sums that need not repeat where the configuration wants such that do.
void CheckSums(const Rank& rank, const trainer::TrainOptions& options) {
  const auto chosen = parallel::Environment(parallel::kNcclSwitchSums);
  std::string error;
  if (options.deterministic && chosen.has_value() && *chosen != "0") {
    error = Str("run.deterministic is true, but ", parallel::kNcclSwitchSums, "=", *chosen,
                " lets switches add up gradients in an order that need not repeat; unset it, or ",
                "set run.deterministic: false");
  }
  error = parallel::FirstError(rank.world, error);
  if (!error.empty()) throw ConfigError(error);
}

}  // namespace

RankDevice ChooseDevice(const Rank& rank, const trainer::TrainOptions& options) {
  if (options.device == DeviceKind::kCpu) return {};
  RankDevice chosen;
  std::string why;
  const int count = cuda::DeviceCount(&why);
  LONGSPAN_CHECK(count > 0) << why;
  chosen.device = {DeviceKind::kCuda, rank.is_thread ? 0 : rank.local_rank % count};
  const cuda::DeviceFacts facts = cuda::FactsOf(chosen.device.index);
  chosen.name = facts.name;
  chosen.ranks =
      rank.is_thread ? rank.world.size() : RanksOnMyGpu(rank, options, chosen.device.index, facts);
  return chosen;
}

Context MakeContext(const Rank& rank, const RankDevice& device,
                    const trainer::TrainOptions& options) {
  return Context(ContextOptions{.device = device.device,
                                .threads = options.threads > 0 ? options.threads : rank.threads,
                                .deterministic = options.deterministic,
                                .sync_checks = options.sync_checks});
}

std::unique_ptr<parallel::Communicator> MakeCarrier(const Rank& rank,
                                                    const trainer::TrainOptions& options,
                                                    const Context& ctx) {
  using trainer::CommBackend;
  if (options.device == DeviceKind::kCpu) return nullptr;
  if (rank.is_thread) {
    if (options.backend == CommBackend::kAuto) return nullptr;
    throw ConfigError(
        "parallel.backend has no meaning with --local-ranks, whose threads share one GPU; leave it "
        "out");
  }
  if (rank.world.name() == "nccl") {  // the job was started over NCCL
    CheckSums(rank, options);
    if (options.backend != CommBackend::kMpi) return nullptr;
    throw ConfigError(
        "parallel.backend is MPI, but the ranks of this job met through LONGSPAN_RENDEZVOUS; start "
        "them with mpirun, or use AUTO");
  }
  const bool nccl = options.backend == CommBackend::kNccl ||
                    (options.backend == CommBackend::kAuto && parallel::NcclBuiltIn());
  if (rank.world.size() == 1 || !nccl) return nullptr;
  CheckSums(rank, options);
  return parallel::MakeNccl(rank.world, ctx.runtime(), {.deterministic = options.deterministic});
}

double PeakFlops(const Context& ctx, parallel::Communicator& world, const RankDevice& device,
                 DType dtype) {
  // Apart from the run's memory, whose high-water mark is reported.
  Context own(ContextOptions{.device = ctx.device(), .threads = ctx.threads()});
  world.Barrier();
  double mine = 0;
  if (device.device.kind == DeviceKind::kCuda) {
    const auto known = KnownGpu(device.name);
    mine = known.has_value() ? (dtype == DType::kBF16 ? known->bf16_gflops : known->f32_gflops)
                             : MeasureGemmGflops(own, dtype);
    if (known.has_value()) mine /= device.ranks;
  } else {
    const MachinePeaks peaks = MeasurePeaks(own);
    mine = dtype == DType::kBF16 ? peaks.bf16_gflops : peaks.f32_gflops;
    if (dtype == DType::kF64) mine /= 2;  // half the lanes of f32
  }
  return parallel::AllReduceValue(world, mine, parallel::ReduceOp::kSum) * 1e9;
}

}  // namespace longspan::launch
