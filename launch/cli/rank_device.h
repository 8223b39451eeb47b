#pragma once
#include <memory>
#include <string>

#include "launch/cli/session.h"
#include "ops/core/context.h"
#include "trainer/options.h"

namespace longspan::launch {

// The device of one rank.
struct RankDevice {
  Device device;
  std::string name = "CPU";  // of a GPU: as its maker calls it
  int ranks = 1;             // that use this GPU
};

// On CUDA the n-th rank of a node gets GPU n modulo the number that the process sees; threads of
// one process share GPU 0. Collective.
//
// Errors    ConfigError when two processes would share a GPU and parallel.backend is AUTO. MPI can
//           do that; NCCL only when told that they are different hosts (NCCL_HOSTID)
RankDevice ChooseDevice(const Rank& rank, const trainer::TrainOptions& options);

// The Context of a rank on its device.
Context MakeContext(const Rank& rank, const RankDevice& device,
                    const trainer::TrainOptions& options);

// What carries the tensors of a job: NCCL among processes on GPUs where it is chosen, else nullptr,
// which stands for rank.world. Call UseDevice on what is used. Collective.
//
// Errors    ConfigError when parallel.backend does not go with how the job was started, or
//           run.deterministic with NCCL_NVLS_ENABLE
std::unique_ptr<parallel::Communicator> MakeCarrier(const Rank& rank,
                                                    const trainer::TrainOptions& options,
                                                    const Context& ctx);

// FLOP/s of all ranks together at matrix products in `dtype`, what MFU is a fraction of: of a GPU
// what its maker says, or for unknown ones the best that a product reaches now; of a CPU measured
// now. Collective; at the same time on all ranks, so that those which share cores or a GPU do not
// count them twice.
double PeakFlops(const Context& ctx, parallel::Communicator& world, const RankDevice& device,
                 DType dtype);

}  // namespace longspan::launch
