// What the NCCL communicator adds to the contract: failures end, and say why. On the emulated NCCL.
#include "parallel/comm/nccl.h"

#include <gtest/gtest.h>
#include <nccl.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>

#include "ops/core/context.h"
#include "ops/core/cuda/backend.h"
#include "parallel/comm/bootstrap.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "tests/emulated_cuda/emulator.h"
#include "tests/emulated_cuda/nccl_control.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::MakeNccl;
using parallel::NcclOptions;
using parallel::ReduceOp;
using parallel::RunLocal;
using parallel::Work;

Context GpuContext() {
  return Context(ContextOptions{.device = {DeviceKind::kCuda, 0}, .threads = 1});
}

NcclOptions Quick() {
  NcclOptions options;
  options.connect_timeout_s = 20;
  options.timeout_s = 20;
  options.exit_after_s = 0;
  return options;
}

// Host tensors go through the GPU, as in a job without MPI.
std::unique_ptr<Communicator> Connect(Communicator& control, Context& ctx,
                                      const NcclOptions& options) {
  const std::string id =
      BroadcastString(control, control.rank() == 0 ? parallel::MakeNcclId() : std::string(), 0);
  return MakeNccl(id, control.rank(), control.size(), ctx.runtime(), options);
}

std::string ErrorOf(const std::function<void()>& body) {
  try {
    body();
  } catch (const CommError& e) {
    return e.what();
  }
  return "";
}

void ExpectNamed(const std::string& error, const std::string& text) {
  EXPECT_NE(error.find(text), std::string::npos) << error;
}

TEST(NcclTest, NothingIsLeftBehind) {
  RunLocal(3, [](Communicator& control) {
    Context ctx = GpuContext();
    const auto world = Connect(control, ctx, Quick());
    EXPECT_EQ(world->rank(), control.rank());
    const auto part = world->Split(world->rank() % 2, 0), none = world->Split(-1, 0);
    EXPECT_EQ(none, nullptr);
    part->AllReduce(ctx.Zeros({5}, DType::kF32), ReduceOp::kSum).Wait();
  });
  EXPECT_EQ(emulated::LiveNcclComms(), 0);
  EXPECT_EQ(emulated::AbortedNcclComms(), 0) << "a clean end aborts nothing";
}

// Host values do not wait for the compute stream, nor it for them.
TEST(NcclTest, HostValuesTravelBesideGpuTensors) {
  RunLocal(2, [](Communicator& control) {
    Context ctx = GpuContext();
    const auto comm = Connect(control, ctx, Quick());
    Tensor t = ctx.Zeros({100000}, DType::kF32);
    Work work = comm->AllReduce(t, ReduceOp::kSum);
    EXPECT_EQ(AllReduceValue(*comm, int64_t{comm->rank()}, ReduceOp::kSum), 1);
    work.Wait();
    EXPECT_EQ(FirstError(*comm, comm->rank() == 1 ? "no space" : ""), "no space");
  });
}

TEST(NcclTest, RanksThatDoNotComeAreADeadline) {
  Context ctx = GpuContext();
  NcclOptions options = Quick();
  options.connect_timeout_s = 0.2;
  const std::string id = parallel::MakeNcclId();
  ExpectNamed(ErrorOf([&] { MakeNccl(id, 1, 3, ctx.runtime(), options); }),
              "NCCL on 3 ranks: not all ranks came within 0.2 s");
  // In Split as well.
  std::atomic<bool> over{false};
  RunLocal(2, [&](Communicator& control) {
    Context mine = GpuContext();
    NcclOptions hasty = options;
    hasty.connect_timeout_s = control.rank() == 0 ? 0.3 : 20;
    const auto comm = Connect(control, mine, hasty);
    if (control.rank() == 0) {
      ExpectNamed(ErrorOf([&] { comm->Split(0, 0); }), "Split: not all ranks came within 0.3 s");
      over = true;
    }
    while (!over) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  EXPECT_THROW(MakeNccl("short", 0, 1, ctx.runtime(), options), InvalidArgument);
}

// Rank 1 never issues the operation. Rank 0 must neither hang on the host nor take the aborted
// result for one, and the GPU must be free again.
TEST(NcclTest, AnOperationThatNeverEndsIsAborted) {
  const int aborted = emulated::AbortedNcclComms();
  RunLocal(2, [](Communicator& control) {
    Context ctx = GpuContext();
    NcclOptions options = Quick();
    if (control.rank() == 0) options.timeout_s = 0.3;
    const auto comm = Connect(control, ctx, options);
    const auto part = comm->Split(0, 0);
    if (control.rank() == 0) {
      Tensor t = ctx.Zeros({1000}, DType::kF32);
      Work work = part->AllReduce(t, ReduceOp::kSum);
      Work(work).Wait();  // only an order of streams
      EXPECT_TRUE(work.Done()) << "as far as the compute stream is concerned";
      ExpectNamed(ErrorOf([&] { comm->Barrier(); }),
                  "AllReduce of f32[1000] (operation 0 of 2 ranks) is not complete after 0.3 s");
      EXPECT_THROW(part->Barrier(), CommError) << "all communicators of the process have failed";
      EXPECT_THROW(comm->Split(0, 0), CommError);
      EXPECT_THROW(work = comm->AllReduce(t, ReduceOp::kSum), CommError);
      cuda::Synchronize(ctx.cuda());  // returns
      EXPECT_THROW(work.Done(), CommError) << "the host can tell that there is no sum";
    }
    control.Barrier();
  });
  // Both of rank 0; those of rank 1 end in order, as nothing of theirs is under way.
  EXPECT_EQ(emulated::AbortedNcclComms(), aborted + 2);
  EXPECT_EQ(emulated::LiveNcclComms(), 0);
}

TEST(NcclTest, WaitAndDoneOfAFailedOperationThrow) {
  RunLocal(2, [](Communicator& control) {
    Context ctx = GpuContext();
    NcclOptions options = Quick();
    if (control.rank() == 0) options.timeout_s = 0.2;
    const auto comm = Connect(control, ctx, options);
    if (control.rank() == 0) {
      Tensor t = ctx.Zeros({1000}, DType::kF32);
      Work work = comm->AllReduce(t, ReduceOp::kSum);
      ExpectNamed(ErrorOf([&] {
                    while (!work.Done()) std::this_thread::yield();
                  }),
                  "not complete after 0.2 s");
      EXPECT_THROW(work.Wait(), CommError);
    }
    control.Barrier();
  });
}

// The host beside NCCL: rank 1 never comes to the barrier, and rank 0 learns of the failure long
// before its own deadline.
TEST(NcclTest, AFailureEndsWaitsOfTheHost) {
  std::atomic<bool> seen{false};
  RunLocal(2, [&](Communicator& control) {
    Context ctx = GpuContext();
    const auto comm = MakeNccl(control, ctx.runtime(), Quick());
    const auto part = comm->Split(0, comm->rank());
    EXPECT_EQ(AllReduceValue(*part, int64_t{1}, ReduceOp::kSum), 2);
    if (control.rank() == 0) {
      Tensor t = ctx.Zeros({1000}, DType::kF32);
      part->AllReduce(t, ReduceOp::kSum).Wait();
      emulated::FailNcclRank(0, ncclRemoteError);
      ExpectNamed(ErrorOf([&] { part->Barrier(); }), "remote process exited");
      emulated::FailNcclRank(-1, 0);
      seen = true;
    }
    while (!seen) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  EXPECT_TRUE(seen);
}

// Nothing is under way on the GPU that the watchdog could find late.
TEST(NcclTest, WaitsOfTheHostHaveADeadline) {
  std::atomic<bool> seen{false};
  RunLocal(2, [&](Communicator& control) {
    Context ctx = GpuContext();
    NcclOptions options = Quick();
    if (control.rank() == 0) options.timeout_s = 0.3;
    const auto comm = MakeNccl(control, ctx.runtime(), options);
    if (control.rank() == 0) {
      ExpectNamed(ErrorOf([&] { comm->Barrier(); }),
                  "AllReduce of i64[1] in host memory of 2 ranks is not complete after 0.3 s");
      EXPECT_THROW(comm->Barrier(), CommError);
      seen = true;
    }
    while (!seen) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  EXPECT_TRUE(seen);
}

// Sums of switches need not repeat; what the user has set stays.
TEST(NcclTest, SumsRepeatUnlessTheyNeedNot) {
  const auto variable = [] { return parallel::Environment(parallel::kNcclSwitchSums); };
  const auto connect = [](bool deterministic) {
    Context ctx = GpuContext();
    NcclOptions options = Quick();
    options.deterministic = deterministic;
    parallel::SelfCommunicator self;
    MakeNccl(self, ctx.runtime(), options);
  };
  unsetenv(parallel::kNcclSwitchSums);
  connect(false);
  EXPECT_EQ(variable(), std::nullopt);
  connect(true);
  EXPECT_EQ(variable(), "0");
  setenv(parallel::kNcclSwitchSums, "1", 1);
  connect(true);
  EXPECT_EQ(variable(), "1");
  unsetenv(parallel::kNcclSwitchSums);
}

// One rank's transport fails; the other learns of it on another way, long before its own deadline.
TEST(NcclTest, AFailureIsPublishedToTheOthers) {
  std::mutex mutex;
  std::optional<std::string> published;
  RunLocal(2, [&](Communicator& control) {
    Context ctx = GpuContext();
    NcclOptions options = Quick();
    options.publish_failure = [&](const std::string& reason) {
      std::lock_guard lock(mutex);
      if (!published) published = reason;
    };
    options.foreign_failure = [&] {
      std::lock_guard lock(mutex);
      return published;
    };
    const auto comm = Connect(control, ctx, options);
    comm->Barrier();
    control.Barrier();
    if (control.rank() == 1) emulated::FailNcclRank(1, ncclRemoteError);
    const std::string error = ErrorOf([&] {
      for (;;) {
        Tensor t = ctx.Zeros({10}, DType::kF32);
        if (control.rank() == 0) AllReduceValue(*comm, 1.0, ReduceOp::kSum);
        EXPECT_NO_THROW(std::this_thread::sleep_for(std::chrono::milliseconds(5)));
        if (control.rank() == 1) comm->AllReduce(t, ReduceOp::kSum).Wait();
      }
    });
    ExpectNamed(error,
                control.rank() == 1 ? "rank 1 of 2" : "another rank has failed: rank 1 of 2");
    ExpectNamed(error, "remote process exited");
    control.Barrier();
    emulated::FailNcclRank(-1, 0);
  });
  EXPECT_EQ(emulated::LiveNcclComms(), 0);
}

TEST(NcclTest, MoreRanksThanGpusOfANodeAreRefused) {
  std::map<const char*, const char*> variables = {{"LONGSPAN_RENDEZVOUS", "/nonexistent/meet"},
                                                  {"LONGSPAN_JOB_ID", "1"},
                                                  {"LONGSPAN_WORLD_SIZE", "9"},
                                                  {"LONGSPAN_RANK", "0"},
                                                  {"LONGSPAN_LOCAL_SIZE", "3"},
                                                  {"LONGSPAN_LOCAL_RANK", "0"}};
  for (const auto& [name, value] : variables) setenv(name, value, 1);
  const auto start = []() -> std::string {
    try {
      parallel::Bootstrap::Start();
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  emulated::SetDeviceCount(2);
  ExpectNamed(start(), "this node has 2 for its 3 ranks");
  setenv("LONGSPAN_LOCAL_SIZE", "2", 1);
  ExpectNamed(start(), "cannot write /nonexistent/meet");
  setenv("LONGSPAN_LOCAL_SIZE", "3", 1);
  setenv("NCCL_HOSTID", "mine", 1);
  ExpectNamed(start(), "cannot write /nonexistent/meet");
  unsetenv("NCCL_HOSTID");
  emulated::SetDeviceCount(1);  // perhaps another one for each rank
  ExpectNamed(start(), "cannot write /nonexistent/meet");
  for (const auto& [name, value] : variables) unsetenv(name);
  unsetenv(parallel::kNcclSwitchSums);
}

// A program that does not come back to the communicator after a failure is ended.
TEST(NcclDeathTest, AProcessThatHangsAfterAFailureEndsWithCode3) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto hang = [] {
    RunLocal(2, [](Communicator& control) {
      Context ctx = GpuContext();
      NcclOptions options;
      if (control.rank() == 0) options.timeout_s = 0.2, options.exit_after_s = 0.3;
      const auto comm = Connect(control, ctx, options);
      Tensor t = ctx.Zeros({1000}, DType::kF32);
      if (control.rank() == 0) comm->AllReduce(t, ReduceOp::kSum).Wait();
      std::this_thread::sleep_for(std::chrono::seconds(60));
    });
  };
  EXPECT_EXIT(hang(), testing::ExitedWithCode(3), "is not complete after 0.2 s");
}

TEST(NcclDeathTest, AbortEndsTheProcessWithCode3AndTellsTheOthers) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto abort = [] {
    Context ctx = GpuContext();
    NcclOptions options;
    options.publish_failure = [](const std::string& reason) {
      std::fprintf(stderr, "told: %s\n", reason.c_str());
    };
    MakeNccl(parallel::MakeNcclId(), 0, 1, ctx.runtime(), options)->Abort("disk is full");
  };
  EXPECT_EXIT(abort(), testing::ExitedWithCode(3), "told: disk is full");
}

}  // namespace
}  // namespace longspan::test
