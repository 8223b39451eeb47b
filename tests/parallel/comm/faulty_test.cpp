// What is made to fail fails, in the operation and on the rank that was named, and nothing hangs.
#include "parallel/comm/faulty.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "parallel/comm/arguments.h"
#include "parallel/comm/local.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::Fault;
using parallel::FaultyCommunicator;
using parallel::ParseFault;
using parallel::ReduceOp;

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Three operations, of which the third is an Exchange around the ring on a part; sums are right.
void Program(Communicator& comm) {
  const int p = comm.size();
  const auto part = comm.Split(0, comm.rank());
  EXPECT_EQ(AllReduceValue(comm, int64_t{1}, ReduceOp::kSum), p);
  comm.Barrier();
  int64_t out = comm.rank(), in = -1;
  part->Exchange({{(comm.rank() + 1) % p, &out, 8}}, {{(comm.rank() + p - 1) % p, &in, 8}}).Wait();
  EXPECT_EQ(in, (comm.rank() + p - 1) % p);
  EXPECT_EQ(AllReduceValue(*part, int64_t{2}, ReduceOp::kSum), 2 * p);
}

TEST(FaultyTest, WithoutAFaultOfThisRankNothingChanges) {
  parallel::RunLocal(3, [](Communicator& comm) {
    FaultyCommunicator faulty(comm, {{Fault::Kind::kThrow, 7, 0}, {Fault::Kind::kLose, 1, 99}});
    Program(faulty);
  });
}

TEST(FaultyTest, AThrowingRankReleasesTheOthers) {
  std::atomic<int> released{0};
  try {
    parallel::RunLocal(3, [&](Communicator& comm) {
      FaultyCommunicator faulty(comm, {{Fault::Kind::kThrow, 1, 2}});
      try {
        Program(faulty);
      } catch (const CommError& e) {
        ++released;
        EXPECT_NE(std::string(e.what()).find("rank 1 fails at Exchange (operation 2)"),
                  std::string::npos)
            << e.what();
        throw;
      }
    });
    ADD_FAILURE() << "nothing failed";
  } catch (const parallel::InjectedFault& e) {
    EXPECT_NE(std::string(e.what()).find("rank 1 fails at Exchange"), std::string::npos);
  }
  EXPECT_EQ(released, 2);
}

// Every rank gets the typed error, also the one whose message is lost, and it names who is missing.
TEST(FaultyTest, ALostMessageEndsTheJobInTime) {
  for (const int64_t operation : {0, 1, 2}) {  // AllReduce, Barrier, Exchange
    std::atomic<int> errors{0}, named{0};
    const auto start = std::chrono::steady_clock::now();
    EXPECT_THROW(
        parallel::RunLocal(3,
                           [&](Communicator& comm) {
                             FaultyCommunicator faulty(comm, {{Fault::Kind::kLose, 1, operation}});
                             faulty.SetTimeout(1);
                             try {
                               Program(faulty);
                             } catch (const CommError& e) {
                               ++errors;
                               const std::string text = e.what();
                               named += text.find(" of 3 waited 1 s for ") != std::string::npos &&
                                        text.find("not issued by rank 1") != std::string::npos;
                               throw;
                             }
                           }),
        CommError);
    EXPECT_EQ(errors, 3) << operation;
    EXPECT_EQ(named, 3) << operation;
    EXPECT_GE(SecondsSince(start), 1);
    EXPECT_LT(SecondsSince(start), 20);
  }
}

TEST(FaultyTest, WhatNobodyMissesEndsAsWell) {
  std::atomic<bool> over{false};
  parallel::RunLocal(2, [&](Communicator& comm) {
    FaultyCommunicator faulty(comm, {{Fault::Kind::kLose, 0, 0}});
    faulty.SetTimeout(0.1);
    while (comm.rank() == 1 && !over) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (comm.rank() == 1) return;
    auto work = faulty.Exchange({}, {});
    EXPECT_FALSE(work.Done());
    EXPECT_FALSE(faulty.Exchange({}, {}).Done()) << "nothing comes through later either";
    EXPECT_EQ(work.CompletedFraction(), 0);
    try {
      work.Wait();
      ADD_FAILURE() << "it was lost";
    } catch (const CommError& e) {
      EXPECT_NE(std::string(e.what()).find("Exchange of rank 0 was lost on purpose"),
                std::string::npos)
          << e.what();
    }
    over = true;
  });
}

TEST(FaultyTest, ASlowRankIsOnlySlow) {
  const auto start = std::chrono::steady_clock::now();
  parallel::RunLocal(3, [](Communicator& comm) {
    FaultyCommunicator faulty(comm, {{Fault::Kind::kDelay, 2, 1, 0.03}});
    Program(faulty);  // operations 1, 2 and 3
  });
  EXPECT_GE(SecondsSince(start), 0.09);
}

TEST(FaultyTest, FaultsAreParsed) {
  const Fault lose = ParseFault("lose:2:15");
  EXPECT_EQ(lose.kind, Fault::Kind::kLose);
  EXPECT_EQ(lose.rank, 2);
  EXPECT_EQ(lose.operation, 15);
  const Fault delay = ParseFault("delay:0:3:0.25");
  EXPECT_EQ(delay.kind, Fault::Kind::kDelay);
  EXPECT_EQ(delay.seconds, 0.25);
  EXPECT_EQ(ParseFault("throw:1:0").kind, Fault::Kind::kThrow);
  for (const char* text : {"", "lose", "lose:1", "lose:1:2:3", "lose:x:2", "lose:1:-2", "lose:1:2x",
                           "delay:1:2", "delay:1:2:nan", "delay:1:2:-1", "burn:1:2", "lose::2"}) {
    try {
      ParseFault(text);
      ADD_FAILURE() << text;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find("lose:RANK:OPERATION"), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace longspan::test
