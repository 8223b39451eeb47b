// What the MPI communicator adds to the contract: transfers that move while kernels compute,
// time-outs, and the sizes that only the receiver can check.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <thread>

#include "ops/core/context.h"
#include "ops/core/parallel_for.h"
#include "parallel/comm/arguments.h"
#include "tests/parallel/comm/mpi_main.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::ReduceOp;
using parallel::Work;

TEST(MpiTest, JobDescribesItself) {
  auto& job = Job();
  EXPECT_TRUE(job.launched());
  EXPECT_EQ(job.world().name(), "mpi");
  EXPECT_EQ(job.local_size(), job.size()) << "the tests run on one machine";
  EXPECT_EQ(job.local_rank(), job.rank());
  EXPECT_GE(job.threads(), 1);
}

// Exchanges 64 MB with a neighbour while this rank computes `tasks` tasks, and returns the share of
// it that has arrived when the computing ends, on the rank where it is least.
double FractionAfterCompute(int64_t tasks, bool with_progress) {
  Communicator& world = Job().world();
  constexpr int64_t kBytes = 64 << 20;
  const int next = (world.rank() + 1) % world.size();
  const int previous = (world.rank() + world.size() - 1) % world.size();
  ContextOptions options;
  options.threads = Job().threads();
  Context ctx(options);
  if (with_progress) ctx.SetProgress([&] { world.Progress(); });
  Tensor out = ctx.Empty({kBytes}, DType::kU8), in = ctx.Zeros({kBytes}, DType::kU8);
  std::fill_n(out.data<uint8_t>(), kBytes, static_cast<uint8_t>(world.rank() + 1));
  world.Barrier();
  Work work = world.Exchange({{next, out.raw(), kBytes}}, {{previous, in.raw(), kBytes}});
  std::vector<double> sinks(static_cast<size_t>(ctx.threads()));
  ParallelFor(ctx, tasks, [&](int64_t task, int worker) {
    double sum = 0;
    for (int i = 1; i < 20000; ++i) sum += 1.0 / (static_cast<double>(task) + i);
    sinks[static_cast<size_t>(worker)] += sum;
  });
  const double fraction = work.CompletedFraction();
  work.Wait();
  EXPECT_EQ(work.CompletedFraction(), 1.0);
  for (int64_t i = 0; i < kBytes; i += 4097) {
    EXPECT_EQ(in.data<uint8_t>()[i], static_cast<uint8_t>(previous + 1));
  }
  for (double sink : sinks) EXPECT_GE(sink, 0.0);
  return AllReduceValue(world, fraction, ReduceOp::kMin);
}

TEST(MpiTest, ProgressBetweenTasksMovesALargeTransfer) {
  // On a busy machine a neighbour may be late: then there is more to compute.
  int64_t tasks = 2000;
  double with = FractionAfterCompute(tasks, /*with_progress=*/true);
  while (with < 0.8 && tasks < 32000) {
    tasks *= 2;
    with = FractionAfterCompute(tasks, /*with_progress=*/true);
  }
  EXPECT_GE(with, 0.8);
  if (Job().size() == 1) return;  // a message to oneself is complete at once
  const double without = FractionAfterCompute(tasks, /*with_progress=*/false);
  RecordProperty("fraction_with_progress", std::to_string(with));
  RecordProperty("fraction_without_progress", std::to_string(without));
  if (Job().rank() == 0) {
    std::printf("64 MB under compute: %.0f %% moved with progress, %.0f %% without\n", 100 * with,
                100 * without);
  }
  EXPECT_LE(without, 0.3) << "the test no longer measures what progress calls do";
}

TEST(MpiTest, MessagesThatDifferInSizeAreErrors) {
  Communicator& world = Job().world();
  const auto comm = world.Split(0, world.rank());
  const int me = comm->rank(), last = comm->size() - 1;
  std::vector<char> out(64), in(64);
  for (int64_t expected : {63, 65 - 32}) {  // a piece that is too long; one that is too short
    const int64_t sent = expected == 63 ? 64 : 32;
    std::vector<parallel::Send> sends;
    std::vector<parallel::Recv> recvs;
    if (me == 0) sends.push_back({last, out.data(), sent});
    if (me == last) recvs.push_back({0, in.data(), expected});
    if (me == last) {
      EXPECT_THROW(comm->Exchange(sends, recvs).Wait(), CommError) << sent;
    } else {
      comm->Exchange(sends, recvs).Wait();
    }
  }
  // The communicator is usable afterwards.
  EXPECT_EQ(AllReduceValue(*comm, int64_t{1}, ReduceOp::kSum), comm->size());
}

TEST(MpiTest, AWaitThatTakesTooLongNamesTheOperation) {
  Communicator& world = Job().world();
  if (world.size() == 1) return;  // nobody to wait for
  const auto impatient = parallel::internal::MakeMpiWorld({.timeout_s = 0.2});
  const int last = world.size() - 1;
  char out = 'x', in = '-';
  if (world.rank() == 0) {
    Work work = impatient->Exchange({}, {{last, &in, 1}});
    try {
      work.Wait();
      ADD_FAILURE() << "nothing was sent";
    } catch (const CommError& e) {
      const std::string text = e.what();
      EXPECT_NE(text.find("Exchange (operation 0"), std::string::npos) << text;
      EXPECT_NE(text.find(Str(" on rank 0 of ", world.size(), " is not complete after 0.2 s: its ",
                              "messages with rank ", last, " of the job have not arrived")),
                std::string::npos)
          << text;
    }
    world.Barrier();
    while (!work.Done()) std::this_thread::yield();
    EXPECT_EQ(in, 'x');
  } else {
    world.Barrier();
    std::vector<parallel::Send> sends;
    if (world.rank() == last) sends.push_back({0, &out, 1});
    impatient->Exchange(sends, {}).Wait();
  }
  world.Barrier();
}

// MPI does not tell who keeps a collective operation from its end, so the ranks do.
TEST(MpiTest, AWaitThatTakesTooLongNamesWhoIsMissing) {
  Communicator& world = Job().world();
  if (world.size() < 2) return;  // nobody to wait for
  const int last = world.size() - 1;
  const bool late = world.rank() == last;
  const auto impatient = parallel::internal::MakeMpiWorld({.timeout_s = late ? 60 : 0.2});
  const auto part = impatient->Split(0, -world.rank());
  for (const bool answers : {true, false}) {
    char out = 'x';
    std::vector<char> in(static_cast<size_t>(world.size()));
    // Once the others have asked. Until then the late rank, if it answers, waits for a message.
    const auto meet = [&] {
      std::vector<parallel::Send> sends;
      std::vector<parallel::Recv> recvs;
      for (int r = 0; r < last && !late; ++r) {
        sends.push_back({r, &out, 1});
        recvs.push_back({r, &in[static_cast<size_t>(r)], 1});
      }
      impatient->Exchange(sends, recvs).Wait();
      if (!answers) return;
      sends.clear(), recvs.clear();
      if (world.rank() == 0) sends.push_back({last, &out, 1});
      if (late) recvs.push_back({0, in.data(), 1});
      impatient->Exchange(sends, recvs).Wait();
    };
    if (late) {
      meet();
      world.Barrier();
      EXPECT_EQ(AllReduceValue(*part, int64_t{1}, ReduceOp::kSum), world.size());
      continue;
    }
    Tensor t = parallel::internal::HostTensor({1}, DType::kI64);
    t.data<int64_t>()[0] = 1;
    Work work = part->AllReduce(t, ReduceOp::kSum);
    try {
      work.Wait();
      ADD_FAILURE() << "the last rank has not issued it";
    } catch (const CommError& e) {
      const std::string expected =
          Str(" is not complete after 0.2 s: ",
              answers ? "not issued by rank " : "no answer from rank ", last, " of the job");
      const std::string text = e.what();
      EXPECT_TRUE(text.ends_with(expected)) << text;
    }
    impatient->SetTimeout(60);
    meet();
    world.Barrier();
    work.Wait();
    EXPECT_EQ(t.data<int64_t>()[0], world.size());
    impatient->SetTimeout(0.2);
  }
  world.Barrier();
}

// As when the process of a rank ends: nothing waits until the time is up.
TEST(MpiTest, AWaitEndsWhenAnotherRankHasFailed) {
  Communicator& world = Job().world();
  const auto failed = std::make_shared<std::atomic<bool>>(false);
  parallel::MpiOptions options;
  options.foreign_failure = [failed]() -> std::optional<std::string> {
    if (*failed) return "rank 77 has ended";
    return std::nullopt;
  };
  const auto told = parallel::internal::MakeMpiWorld(options);
  if (world.size() == 1) return;  // nobody to wait for
  const int last = world.size() - 1;
  const auto part = told->Split(world.rank() == 0 || world.rank() == last ? 0 : 1, -world.rank());
  char out = 'x', in = '-';
  if (world.rank() == 0) {
    Work work = part->Exchange({}, {{0, &in, 1}});  // `last` comes first in the part
    EXPECT_FALSE(work.Done());
    *failed = true;
    try {
      work.Wait();
      ADD_FAILURE() << "nothing was sent";
    } catch (const CommError& e) {
      const std::string text = e.what();
      EXPECT_NE(text.find("cannot be completed: rank 77 has ended"), std::string::npos) << text;
      const std::string who = world.size() == 2 ? " on rank 1 of 2" : ", rank 0 of the job";
      EXPECT_NE(text.find(who), std::string::npos) << text;
    }
    *failed = false;
    world.Barrier();
    work.Wait();
    EXPECT_EQ(in, 'x');
  } else {
    world.Barrier();
    if (world.rank() == last) part->Exchange({{1, &out, 1}}, {}).Wait();
  }
  world.Barrier();
}

TEST(MpiTest, ALargeReductionIsPutTogetherFromItsPieces) {
  Communicator& world = Job().world();
  Context ctx;
  constexpr int64_t kN = (9 << 20) + 3;  // 144 pieces and a rest
  Tensor t = ctx.Empty({kN}, DType::kF32);
  float* data = t.data<float>();
  for (int64_t i = 0; i < kN; ++i) data[i] = static_cast<float>(i % 1021 + world.rank());
  world.AllReduce(t, ReduceOp::kSum).Wait();
  const int p = world.size();
  int64_t wrong = 0;
  for (int64_t i = 0; i < kN; ++i) {
    wrong += data[i] != static_cast<float>((i % 1021) * p + p * (p - 1) / 2);
  }
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace longspan::test
