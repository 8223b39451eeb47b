// Communicators that need no launcher: self, threads as ranks, and NCCL among threads where the GPU
// is emulated. Started as one rank of a job without MPI (LONGSPAN_RENDEZVOUS), NCCL among
// processes.
#include <gtest/gtest.h>

#include "ops/core/cuda/backend.h"
#include "parallel/comm/bootstrap.h"
#include "parallel/comm/faulty.h"
#include "parallel/comm/local.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/self.h"
#include "parallel/comm/simulated.h"
#include "tests/parallel/comm/contract.h"

namespace longspan::test {
namespace {

// The library refuses two ranks of one process on one GPU.
bool CanShareGpu() {
  return cuda::DeviceCount() > 0 && cuda::FactsOf(0).name.find("mulated") != std::string::npos;
}

// Host tensors go through the GPU, or over the threads' own communicator.
Harness NcclThreads(int ranks, bool host_beside) {
  return {Str(host_beside ? "nccl_with_host_" : "nccl_", ranks), [=](const auto& body) {
            parallel::RunLocal(ranks, [&](parallel::Communicator& control) {
              parallel::NcclOptions options;
              options.timeout_s = 60;
              options.exit_after_s = 0;
              const auto comm = parallel::MakeNccl(control, cuda::MakeRuntime(0, false), options);
              body(*comm);
            });
          }};
}

// Threads on a simulated network, with nodes of two ranks.
Harness SimulatedThreads(int ranks, parallel::ComputeClock compute) {
  const bool modelled = compute == parallel::ComputeClock::kModelled;
  return {Str(modelled ? "modelled_" : "cpu_time_", ranks), [=](const auto& body) {
            parallel::SimulatedNetwork network(ranks, {.intra = {1e-6, 1e10},
                                                       .inter = {1e-5, 1e9},
                                                       .ranks_per_node = 2,
                                                       .compute = compute,
                                                       .flops_per_s = 1e9});
            parallel::RunLocal(ranks, [&](parallel::Communicator& comm) {
              parallel::SimulatedCommunicator simulated(comm, network);
              body(simulated);
            });
          }};
}

// The job of this process, from the first test that asks until all tests are over.
class Job : public testing::Environment {
 public:
  static parallel::Bootstrap& Get() {
    if (bootstrap_ == nullptr) bootstrap_ = parallel::Bootstrap::Start();
    return *bootstrap_;
  }
  void TearDown() override {
    if (bootstrap_ != nullptr) bootstrap_->Finish();
    bootstrap_.reset();
  }

 private:
  static inline std::unique_ptr<parallel::Bootstrap> bootstrap_;
};

}  // namespace

std::vector<Harness> Harnesses() {
  std::vector<Harness> all;
  if (parallel::Environment("LONGSPAN_RENDEZVOUS")) {
    testing::AddGlobalTestEnvironment(new Job);
    all.push_back({"NcclProcess", [](const auto& body) {
                     auto& world = Job::Get().world();
                     const auto comm = world.Split(0, world.rank());
                     body(*comm);
                     comm->Barrier();
                   }});
    return all;
  }
  all.push_back({"self", [](const auto& body) {
                   parallel::SelfCommunicator self;
                   body(self);
                 }});
  for (int ranks = 1; ranks <= 5; ++ranks) {
    all.push_back(
        {Str("local_", ranks), [ranks](const auto& body) { parallel::RunLocal(ranks, body); }});
  }
  if (parallel::NcclBuiltIn() && cuda::DeviceCount() > 0) {
    for (int ranks = 1; ranks <= (CanShareGpu() ? 4 : 1); ++ranks) {
      all.push_back(NcclThreads(ranks, /*host_beside=*/false));
    }
  }
  std::vector<Harness> counted = {Counted(all[0]), Counted(all[3]), Counted(all.back())};
  if (CanShareGpu()) all.push_back(NcclThreads(3, /*host_beside=*/true));
  for (int ranks : {1, 4}) {
    all.push_back(SimulatedThreads(ranks, parallel::ComputeClock::kModelled));
  }
  all.push_back(SimulatedThreads(3, parallel::ComputeClock::kCpuTime));
  counted.push_back(Counted(all.back()));
  // No operation of it comes to harm.
  all.push_back({"faulty_3", [](const auto& body) {
                   parallel::RunLocal(3, [&](parallel::Communicator& comm) {
                     parallel::FaultyCommunicator faulty(
                         comm, {{parallel::Fault::Kind::kLose, 0, int64_t{1} << 40}});
                     body(faulty);
                   });
                 }});
  all.insert(all.end(), counted.begin(), counted.end());
  return all;
}

}  // namespace longspan::test
