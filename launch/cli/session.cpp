#include "launch/cli/session.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "ops/core/context.h"
#include "ops/core/error.h"
#include "parallel/comm/local.h"

namespace longspan::launch {
namespace {

constexpr auto kMeetingTime = std::chrono::seconds(4);
constexpr int kAllFailed = 2;

// True when every rank comes here within kMeetingTime.
bool MeetAtExit(parallel::Communicator& exit_comm) try {
  Context ctx(ContextOptions{.threads = 1});
  parallel::Work work = exit_comm.AllReduce(ctx.Zeros({1}, DType::kI64), parallel::ReduceOp::kSum);
  const auto deadline = std::chrono::steady_clock::now() + kMeetingTime;
  while (!work.Done()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  work.Wait();
  return true;
} catch (const Error&) {
  return false;  // communication or the device has failed; the first message is what counts
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
  try {
    body(*job);
  } catch (const std::exception& e) {
    error = e.what();
    if (error.empty()) error = "unknown error";
  }
  if (error.empty()) {
    job->Finish();
    return 0;
  }
  std::fflush(stdout);
  if (job->size() == 1 || MeetAtExit(*exit_comm)) {
    if (job->rank() == 0) std::fprintf(stderr, "longspan: error: %s\n", error.c_str());
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
    // As long as the other communicators would wait: a rank may be writing a checkpoint.
    constexpr double kPatience = 3600;
    parallel::RunLocal(local_ranks,
                       [&](parallel::Communicator& world) {
                         body({world, world.rank(), world.size(), threads, true});
                       },
                       {.timeout_s = kPatience});
  });
}

}  // namespace longspan::launch
