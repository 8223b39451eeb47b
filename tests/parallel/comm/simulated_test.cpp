// What the simulated network adds to the contract of communicators: clocks, and that they repeat.
#include "parallel/comm/simulated.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>

#include "ops/core/context.h"
#include "parallel/comm/arguments.h"
#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::ComputeClock;
using parallel::NetworkOptions;
using parallel::Recv;
using parallel::ReduceOp;
using parallel::RunLocal;
using parallel::Send;
using parallel::SimulatedCommunicator;
using parallel::SimulatedNetwork;
using parallel::Work;

// 1 s of latency and 10 bytes/s inside a node, 5 s and 2 bytes/s between nodes, 100 FLOP/s.
NetworkOptions Options(int ranks_per_node = 0) {
  return {.intra = {1, 10}, .inter = {5, 2}, .ranks_per_node = ranks_per_node, .flops_per_s = 100};
}

void RunSimulated(int ranks, const NetworkOptions& options,
                  const std::function<void(SimulatedCommunicator&)>& body) {
  SimulatedNetwork network(ranks, options);
  RunLocal(ranks, [&](Communicator& comm) {
    SimulatedCommunicator simulated(comm, network);
    body(simulated);
  });
}

std::string ErrorOf(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

TEST(SimulatedTest, WaitingMovesTheClockToTheArrival) {
  RunSimulated(2, Options(), [](SimulatedCommunicator& comm) {
    char data[40] = {};
    EXPECT_EQ(comm.now_s(), 0);
    comm.Computed(comm.rank() == 0 ? 200 : 700);  // 2 s and 7 s
    Work work =
        comm.rank() == 0 ? comm.Exchange({{1, data, 40}}, {}) : comm.Exchange({}, {{0, data, 40}});
    comm.Computed(comm.rank() == 0 ? 100 : 0);
    work.Wait();
    work.Wait();  // a second time waits for nothing
    // Sent at 2, there at 2 + 1 + 4; rank 1 is at 7 already. The sender waits for nobody.
    EXPECT_DOUBLE_EQ(comm.now_s(), comm.rank() == 0 ? 3 : 7);
    EXPECT_DOUBLE_EQ(comm.exposed_s(), 0);
    comm.Exchange({{1 - comm.rank(), data, 20}}, {{1 - comm.rank(), data + 20, 20}}).Wait();
    // From rank 0, whose port is free from 6 on: there at 6 + 1 + 2. From rank 1 at 7: there at
    // 7 + 1 + 2.
    EXPECT_DOUBLE_EQ(comm.now_s(), comm.rank() == 0 ? 10 : 9);
    EXPECT_DOUBLE_EQ(comm.exposed_s(), comm.rank() == 0 ? 7 : 2);
    EXPECT_DOUBLE_EQ(comm.compute_s(), comm.rank() == 0 ? 3 : 7);
    comm.Barrier();
    EXPECT_DOUBLE_EQ(comm.now_s(), 10 + 2);
  });
}

TEST(SimulatedTest, CollectivesTakeTheirTime) {
  RunSimulated(4, Options(2), [](SimulatedCommunicator& comm) {
    Tensor t = parallel::internal::HostTensor({20}, DType::kF32);
    std::fill_n(t.data<float>(), 20, 1.0f);
    comm.Computed(100.0 * comm.rank());  // the last comes at 3
    comm.AllReduce(t, ReduceOp::kSum).Wait();
    EXPECT_EQ(t.data<float>()[7], 4);
    EXPECT_DOUBLE_EQ(comm.now_s(), 3 + 6 * (5 + 10.0));
    EXPECT_DOUBLE_EQ(comm.exposed_s(), 3 - comm.rank() + 90);
    EXPECT_EQ(AllReduceValue(comm, int64_t{2}, ReduceOp::kSum), 8);
    EXPECT_DOUBLE_EQ(comm.now_s(), 93 + 6 * (5 + 1.0));
    comm.Broadcast(t, 2).Wait();
    EXPECT_DOUBLE_EQ(comm.now_s(), 129 + 3 * 5 + 40.0);
  });
}

TEST(SimulatedTest, PartsShareTheRanksClockAndKnowItsNode) {
  RunSimulated(4, Options(2), [](SimulatedCommunicator& world) {
    const auto row = world.Split(world.rank() / 2, world.rank());     // on one node
    const auto column = world.Split(world.rank() % 2, world.rank());  // on two
    EXPECT_EQ(world.now_s(), 0) << "Split takes no time";
    char out[10] = {}, in[10] = {};
    row->Computed(100);
    row->Exchange({{1 - row->rank(), out, 10}}, {{1 - row->rank(), in, 10}}).Wait();
    EXPECT_DOUBLE_EQ(world.now_s(), 1 + 1 + 1);
    column->Exchange({{1 - column->rank(), out, 10}}, {{1 - column->rank(), in, 10}}).Wait();
    EXPECT_DOUBLE_EQ(world.now_s(), 3 + 5 + 5);
    auto* part = dynamic_cast<SimulatedCommunicator*>(column.get());
    ASSERT_NE(part, nullptr);
    EXPECT_DOUBLE_EQ(part->now_s(), 13);
    EXPECT_THROW(part->ResetClocks(), InvalidArgument);
    // In reverse order of ranks: rank 0 of the part is rank 3 of the network, on the second node.
    const auto reversed = world.Split(0, -world.rank());
    std::vector<Send> sends;
    std::vector<Recv> recvs;
    if (reversed->rank() == 0) sends.push_back({1, out, 10});
    if (reversed->rank() == 1) recvs.push_back({0, in, 10});
    reversed->Exchange(sends, recvs).Wait();
    EXPECT_DOUBLE_EQ(world.now_s(), world.rank() == 2 ? 13 + 1 + 1 : 13);
    EXPECT_EQ(world.Split(world.rank() == 0 ? -1 : 0, 0) == nullptr, world.rank() == 0);
  });
}

TEST(SimulatedTest, ResetStartsEverythingAnew) {
  RunSimulated(3, Options(), [](SimulatedCommunicator& comm) {
    const auto part = comm.Split(0, comm.rank());
    char out[100] = {}, in[100] = {};
    const int next = (comm.rank() + 1) % 3, previous = (comm.rank() + 2) % 3;
    const auto pass = [&](Communicator& c) {
      c.Computed(10.0 * (c.rank() + 1));
      Work work = c.Exchange({{next, out, 100}}, {{previous, in, 100}});
      c.Exchange({{next, out, 30}}, {{previous, in, 30}}).Wait();
      work.Wait();
    };
    pass(comm);
    pass(*part);
    const double first = comm.now_s(), exposed = comm.exposed_s();
    EXPECT_GT(exposed, 20);
    comm.ResetClocks();
    EXPECT_EQ(comm.now_s(), 0);
    EXPECT_EQ(comm.exposed_s(), 0);
    EXPECT_EQ(comm.compute_s(), 0);
    pass(comm);
    pass(*part);
    EXPECT_EQ(comm.now_s(), first);
    EXPECT_EQ(comm.exposed_s(), exposed);
  });
}

// Times of a program with uneven work, messages to everybody, several operations in flight, parts
// and sums, under whatever the scheduler does.
std::vector<double> TimesOfOneRun(int ranks, uint64_t jitter) {
  std::vector<double> times(static_cast<size_t>(3 * ranks));
  NetworkOptions options = Options(2);
  options.intra = {1e-6, 3.1e9};
  options.inter = {1.7e-5, 1.3e9};
  options.flops_per_s = 1.9e9;
  RunSimulated(ranks, options, [&](SimulatedCommunicator& comm) {
    std::mt19937_64 program(static_cast<uint64_t>(77 + comm.rank()));
    std::mt19937_64 delays(jitter * 1000 + static_cast<uint64_t>(comm.rank()));
    const auto disturb = [&] {
      if (delays() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(delays() % 300));
      if (delays() % 2 == 0) std::this_thread::yield();
    };
    const auto part = comm.Split(comm.rank() % 2, comm.rank());
    Tensor sum = parallel::internal::HostTensor({64}, DType::kF32);
    std::fill_n(sum.data<float>(), 64, 1.0f);
    constexpr int64_t kMost = 4096;
    std::vector<char> out(kMost), in(static_cast<size_t>(ranks) * kMost);
    for (int round = 0; round < 6; ++round) {
      std::vector<Send> sends;
      std::vector<Recv> recvs;
      const auto bytes = [&](int from, int to) { return (from * 7 + to * 13 + round) % 5 * 800; };
      for (int peer = 0; peer < ranks; ++peer) {
        sends.push_back({peer, out.data(), bytes(comm.rank(), peer)});
        recvs.push_back({peer, in.data() + peer * kMost, bytes(peer, comm.rank())});
      }
      disturb();
      Work all = comm.Exchange(sends, recvs);
      comm.Computed(static_cast<double>(program() % 10000));
      disturb();
      Work reduced = part->AllReduce(sum, ReduceOp::kMax);
      comm.Computed(static_cast<double>(program() % 3000));
      if (round % 2 == 0) all.Wait();
      disturb();
      reduced.Wait();
      all.Wait();
      if (round == 3) comm.Barrier();
    }
    const auto r = static_cast<size_t>(3 * comm.rank());
    times[r] = comm.now_s();
    times[r + 1] = comm.exposed_s();
    times[r + 2] = comm.compute_s();
  });
  return times;
}

TEST(SimulatedTest, ModelledTimesRepeatBitForBit) {
  const std::vector<double> first = TimesOfOneRun(8, 0);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_GT(first[i], 0) << i;
  EXPECT_NE(first[0], first[3]) << "the ranks do the same, so nothing is tested";
  for (uint64_t run = 1; run < 30; ++run) ASSERT_EQ(TimesOfOneRun(8, run), first) << "run " << run;
}

double Busy(double seconds) {  // processor time of this thread
  const auto now = [] {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  const double end = now() + seconds;
  double sum = 0;
  while (now() < end) {
    for (int i = 1; i < 1000; ++i) sum += 1.0 / i;
  }
  return sum;
}

TEST(SimulatedTest, ProcessorTimeCountsBetweenCallsOnly) {
  NetworkOptions options = Options();
  options.compute = ComputeClock::kCpuTime;
  options.intra = {0.25, 1e9};
  RunSimulated(2, options, [](SimulatedCommunicator& comm) {
    const bool first = comm.rank() == 0;
    EXPECT_GT(Busy(first ? 0.01 : 0.05), 0);
    comm.Computed(1e30);  // counts where computing is modelled
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // no processor time
    const double computed = comm.compute_s();
    EXPECT_GE(computed, first ? 0.01 : 0.05);
    EXPECT_LT(computed, first ? 0.04 : 0.09);
    // Large messages, which the threads themselves copy.
    std::vector<char> data(64 << 20);
    comm.ResetClocks();
    for (int i = 0; i < 10; ++i) {
      Work work = first ? comm.Exchange({{1, data.data(), int64_t{64} << 20}}, {})
                        : comm.Exchange({}, {{0, data.data(), int64_t{64} << 20}});
      work.Wait();
    }
    EXPECT_LT(comm.compute_s(), 0.005);
    EXPECT_GE(comm.exposed_s(), first ? 0 : 0.25);
  });
}

TEST(SimulatedTest, WhatTheInnerCommunicatorCountsIsWhatIsTimed) {
  SimulatedNetwork network(2, Options());
  RunLocal(2, [&](Communicator& comm) {
    parallel::CountingCommunicator inner(comm);
    SimulatedCommunicator simulated(inner, network);
    parallel::CountingCommunicator outer(simulated);
    char data[8] = {};
    outer.Computed(300);
    EXPECT_DOUBLE_EQ(simulated.now_s(), 3) << "decorators pass Computed on";
    if (comm.rank() == 0) {
      outer.Exchange({{1, data, 8}}, {}).Wait();
    } else {
      outer.Exchange({}, {{0, data, 8}}).Wait();
    }
    {
      const parallel::ControlTraffic control(outer);
      EXPECT_EQ(AllReduceValue(outer, int64_t{1}, ReduceOp::kSum), 2);
    }
    EXPECT_EQ(inner.counts().control.bytes, 8) << "and Traffic";
    EXPECT_EQ(inner.counts().Total().calls, outer.counts().Total().calls);
    EXPECT_EQ(inner.counts().Total().bytes, outer.counts().Total().bytes);
  });
}

TEST(SimulatedTest, ARankThatEndsReleasesTheOthers) {
  // It needs nothing of rank 2, but the time of the operation depends on it.
  const auto error = ErrorOf([] {
    RunSimulated(3, Options(), [](SimulatedCommunicator& comm) {
      char data = 0;
      if (comm.rank() == 2) return;
      if (comm.rank() == 0) comm.Exchange({{1, &data, 1}}, {}).Wait();
      if (comm.rank() == 1) comm.Exchange({}, {{0, &data, 1}}).Wait();
    });
  });
  EXPECT_NE(error.find("rank 2 ended without Exchange (operation 0)"), std::string::npos) << error;
  // The first exception stays the one that counts.
  EXPECT_THROW(RunSimulated(3, Options(),
                            [](SimulatedCommunicator& comm) {
                              if (comm.rank() == 1) throw DataError("broken file");
                              comm.Barrier();
                            }),
               DataError);
}

TEST(SimulatedTest, AWaitForTheTimeIsLimited) {
  const auto error = ErrorOf([] {
    RunSimulated(3, Options(), [](SimulatedCommunicator& comm) {
      comm.SetTimeout(0.5);
      char data = 0;
      if (comm.rank() == 2) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1500));
        return;
      }
      Work work = comm.rank() == 0 ? comm.Exchange({{1, &data, 1}}, {})
                                   : comm.Exchange({}, {{0, &data, 1}});
      work.Wait();
    });
  });
  EXPECT_NE(error.find("waited 0.5 s for the time of Exchange (operation 0); not issued by rank 2"),
            std::string::npos)
      << error;
}

TEST(SimulatedTest, ArgumentsAreChecked) {
  EXPECT_THROW(SimulatedNetwork(0, Options()), InvalidArgument);
  EXPECT_THROW(SimulatedNetwork(2, NetworkOptions{}), InvalidArgument);
  SimulatedNetwork network(3, Options());
  parallel::LocalWorld two(2), three(3);
  const auto small = two.Rank(0), fits = three.Rank(1);
  EXPECT_THROW(SimulatedCommunicator(*small, network), InvalidArgument);
  SimulatedCommunicator one(*fits, network);
  EXPECT_THROW(SimulatedCommunicator(*fits, network), InvalidArgument) << "joined twice";
  EXPECT_THROW(one.Computed(-1), InvalidArgument);
}

}  // namespace
}  // namespace longspan::test
