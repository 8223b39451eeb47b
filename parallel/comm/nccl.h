#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "parallel/comm/communicator.h"

namespace longspan::parallel {

struct NcclOptions {
  double connect_timeout_s = 300;  // for all ranks to be there, at the start and in Split
  // For one operation, from its issue to its end; 0 = no limit.
  double timeout_s = kDefaultTimeoutS;
  // Sums that repeat bit for bit: calls RepeatNcclSums first.
  bool deterministic = true;
  // After a failure the watchdog has aborted all transfers and every call throws CommError. A
  // process that is still there this many seconds later ends with exit code 3; 0: never (tests).
  double exit_after_s = 20;
  // Ways around a transport that is stuck: tells the other ranks of a failure, and asks whether one
  // of them had one. Called from the watchdog's thread.
  std::function<void(const std::string& reason)> publish_failure{};
  std::function<std::optional<std::string>()> foreign_failure{};
};

// Whether this binary has NCCL, or the emulation of it that tests use.
bool NcclBuiltIn();

// Sums that NVLink switches add up (NVLS) need not repeat bit for bit. NCCL leaves them out when
// this variable of the environment is "0" at its first call in the process.
inline constexpr const char* kNcclSwitchSums = "NCCL_NVLS_ENABLE";
// Sets it to "0" where the user has not set it.
void RepeatNcclSums();

// Ranks of a job with one GPU each, over NCCL.
//
// One stream of the highest priority carries the operations of a communicator and of all made from
// it by Split, in the order of issue, which must be the same on all ranks: two communicators never
// wait for each other in different orders. All of them are used by one thread at a time.
//
// Connecting and issuing never block inside NCCL: the host polls until NCCL has taken an operation.
// A watchdog thread polls every communicator's state and the age of every operation. When a
// transport fails, a peer dies, an operation exceeds its time or another rank has published a
// failure, it aborts all communicators of the process, so that nothing waits for ever, on the host
// or on the GPU; results of operations that had not ended are lost, and every call throws CommError
// with the first reason.
//
// Tensors in host memory travel over a part of `control`, beside the GPU. Without it, and in every
// Exchange, they go through pinned memory and the GPU, behind what the stream has been given
// before, and Wait blocks until they are back: meant for values that ranks agree on. Split waits
// for all earlier operations.
//
// Transfers use the tensors where they are. NCCL can register buffers (ncclCommRegister), but only
// memory of its own allocator, on all ranks alike and per communicator, while tensors come from the
// stream-ordered pool of their Context; so nothing is registered.
//
// Ranks connect for their first operations as well, within the longer of the two times.
//
// Errors   Unsupported in a binary without NCCL; CommError when ranks do not come within
//          connect_timeout_s, and for everything NCCL reports
//
// Collective over `control`, whose rank and size the result has.
std::unique_ptr<Communicator> MakeNccl(Communicator& control,
                                       std::shared_ptr<cuda::Runtime> runtime,
                                       const NcclOptions& options = {});

// The same without another communicator. Rank 0 makes the id and hands it to the others by
// whatever way there is (rendezvous.h).
std::string MakeNcclId();
std::unique_ptr<Communicator> MakeNccl(const std::string& id, int rank, int size,
                                       std::shared_ptr<cuda::Runtime> runtime,
                                       const NcclOptions& options = {});

}  // namespace longspan::parallel
