#include "launch/cli/session.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <thread>

#include "ops/core/context.h"
#include "ops/core/error.h"
#include "parallel/comm/local.h"

namespace longspan::launch {
namespace {

constexpr auto kMeetingTime = std::chrono::seconds(4);
constexpr int kAllFailed = 2;

// When every rank comes here within kMeetingTime: the rank whose error is told. A CommError may be
// the consequence of another rank's error, so the lowest rank with one of its own is preferred.
std::optional<int> MeetAtExit(parallel::Communicator& exit_comm, bool consequence) try {
  Context ctx(ContextOptions{.threads = 1});
  const Tensor speaker = ctx.Zeros({1}, DType::kI64);
  speaker.data<int64_t>()[0] = exit_comm.rank() + (consequence ? exit_comm.size() : 0);
  parallel::Work work = exit_comm.AllReduce(speaker, parallel::ReduceOp::kMin);
  const auto deadline = std::chrono::steady_clock::now() + kMeetingTime;
  while (!work.Done()) {
    if (std::chrono::steady_clock::now() > deadline) return std::nullopt;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  work.Wait();
  return static_cast<int>(speaker.data<int64_t>()[0] % exit_comm.size());
} catch (const Error&) {
  return std::nullopt;  // communication or the device has failed; the first message is what counts
}

// Ends the process with `code` when the clean end takes too long, for example because operations
// that were under way when the error came never complete.
void EndAnywayAfter(std::chrono::seconds time, int code) {
  std::thread([time, code] {
    std::this_thread::sleep_for(time);
    std::_Exit(code);
  }).detach();
}

}  // namespace

int RunSession(const std::function<void(parallel::Bootstrap&)>& body) {
  auto job = parallel::Bootstrap::Start();
  // Of its own, so that no unfinished operation of the run can match the meeting.
  auto exit_comm = job->world().Split(0, job->rank());
  // Connects its ranks now: at the meeting they have little time.
  parallel::AllReduceValue(*exit_comm, int64_t{0}, parallel::ReduceOp::kSum);
  std::string error;
  bool consequence = false;
  try {
    body(*job);
  } catch (const std::exception& e) {
    error = e.what();
    if (error.empty()) error = "unknown error";
    consequence = dynamic_cast<const CommError*>(&e) != nullptr;
  }
  if (error.empty()) {
    job->Finish();
    return 0;
  }
  std::fflush(stdout);
  const auto speaker =
      job->size() == 1 ? std::optional<int>(0) : MeetAtExit(*exit_comm, consequence);
  if (speaker.has_value()) {
    const std::string who = *speaker == 0 ? "" : Str(" on rank ", *speaker);
    if (job->rank() == *speaker) {
      std::fprintf(stderr, "longspan: error%s: %s\n", who.c_str(), error.c_str());
    }
    std::fflush(stderr);
    EndAnywayAfter(std::chrono::seconds(3), kAllFailed);
    job->Finish();
    return kAllFailed;
  }
  std::fprintf(stderr, "longspan: error on rank %d: %s\n", job->rank(), error.c_str());
  std::fflush(stderr);
  job->world().Abort(error);
  return kAllFailed;  // not reached: Abort ends the process
}

int NodeRanks(const Rank& rank) {
  const auto agree = [&](parallel::ReduceOp op) {
    return parallel::AllReduceValue(rank.world, int64_t{rank.local_size}, op);
  };
  const int64_t least = agree(parallel::ReduceOp::kMin), most = agree(parallel::ReduceOp::kMax);
  if (least != most) return 1;
  return least == rank.world.size() ? 0 : static_cast<int>(least);
}

int RunRanks(int local_ranks, const std::function<void(const Rank&)>& body) {
  return RunSession([&](parallel::Bootstrap& job) {
    if (local_ranks == 0) {
      body({job.world(), job.local_rank(), job.local_size(), job.threads()});
      return;
    }
    if (job.launched()) {
      throw ConfigError(Str("--local-ranks ", local_ranks, " is for one process, and a launcher ",
                            "started ", job.size(), "; leave it out"));
    }
    const int threads = parallel::ThreadsPerLocalRank(local_ranks);
    parallel::RunLocal(
        local_ranks,
        [&](parallel::Communicator& world) {
          body({world, world.rank(), world.size(), threads, true});
        },
        parallel::LocalOptions());
  });
}

}  // namespace longspan::launch
