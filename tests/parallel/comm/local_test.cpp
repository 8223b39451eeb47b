// What the thread communicator adds to the contract: detached issue, and failures that release
// everybody instead of hanging.
#include "parallel/comm/local.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "ops/core/context.h"
#include "ops/core/parallel_for.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::LocalWorld;
using parallel::PeerFailed;
using parallel::ReduceOp;
using parallel::RunLocal;
using parallel::Work;

Tensor Ones(int64_t n) {
  Context ctx(ContextOptions{.device = {}, .threads = 1});
  Tensor t = ctx.Empty({n}, DType::kF32);
  std::fill_n(t.data<float>(), n, 1.0f);
  return t;
}

std::string ErrorOf(int ranks, const std::function<void(Communicator&)>& body,
                    parallel::LocalOptions options = {.timeout_s = 60}) {
  try {
    RunLocal(ranks, body, options);
  } catch (const CommError& e) {
    return e.what();
  } catch (const std::exception& e) {
    return std::string("other: ") + e.what();
  }
  return "";
}

// All in one thread: rank 1 posts and then does nothing at all while rank 0 completes.
TEST(LocalTest, APostedRankIsNotNeededAnyMore) {
  LocalWorld world(2);
  const auto a = world.Rank(0), b = world.Rank(1);
  Tensor out = Ones(3 << 20), in_b = Ones(3 << 20), in_a = Ones(1), small = Ones(1);
  in_b.data<float>()[77] = 0.0f;
  Work of_b = b->Exchange({{0, small.raw(), 4}}, {{0, in_b.raw(), 12 << 20}});
  EXPECT_EQ(of_b.CompletedFraction(), 0.0);
  EXPECT_EQ(in_b.data<float>()[77], 0.0f) << "moved before the sender posted";
  Work of_a = a->Exchange({{1, out.raw(), 12 << 20}}, {{1, in_a.raw(), 4}});
  EXPECT_EQ(in_b.data<float>()[77], 0.0f) << "issuing must not move data";
  of_a.Wait();
  EXPECT_EQ(in_b.data<float>()[77], 1.0f);
  EXPECT_EQ(of_b.CompletedFraction(), 1.0);
  of_b.Wait();
}

TEST(LocalTest, ProgressMovesABoundedAmount) {
  LocalWorld world(2);
  const auto a = world.Rank(0), b = world.Rank(1);
  constexpr int64_t kBytes = 64 << 20;
  Tensor out = Ones(kBytes / 4), in = Ones(kBytes / 4);
  Work sent = a->Exchange({{1, out.raw(), kBytes}}, {}),
       received = b->Exchange({}, {{0, in.raw(), kBytes}});
  b->Progress();
  EXPECT_GT(received.CompletedFraction(), 0.0);
  EXPECT_LT(received.CompletedFraction(), 0.5);
  for (int i = 0; i < 64; ++i) a->Progress();
  EXPECT_EQ(received.CompletedFraction(), 1.0);
  EXPECT_TRUE(received.Done());
  EXPECT_TRUE(sent.Done());
}

TEST(LocalTest, FirstExceptionIsRethrownAndReleasesTheOthers) {
  std::atomic<int> released{0};
  auto body = [&](Communicator& comm) {
    Tensor t = Ones(8);
    if (comm.rank() == 1) throw DataError("broken file");
    try {
      comm.AllReduce(t, ReduceOp::kSum).Wait();
    } catch (const CommError& e) {
      EXPECT_NE(std::string(e.what()).find("broken file"), std::string::npos) << e.what();
      ++released;
      throw;
    }
  };
  EXPECT_THROW(RunLocal(4, body), DataError);
  EXPECT_EQ(released, 3);
  EXPECT_THROW(RunLocal(2,
                        [](Communicator& comm) {
                          if (comm.rank() == 0) throw 5;
                          comm.Barrier();
                        }),
               int);
}

TEST(LocalTest, AnExceptionWithAPendingOperationKeepsItsType) {
  auto body = [](Communicator& comm) {
    Tensor t = Ones(8);
    Work work = comm.AllReduce(t, ReduceOp::kSum);
    if (comm.rank() == 0) throw std::out_of_range("mine");
    work.Wait();
    comm.Barrier();
  };
  EXPECT_THROW(RunLocal(3, body), std::out_of_range);
}

TEST(LocalTest, AbortFailsPendingAndLaterCallsEverywhere) {
  std::atomic<int> pending{0}, later{0};
  const std::string error = ErrorOf(3, [&](Communicator& comm) {
    const auto part = comm.Split(0, 0);
    Tensor t = Ones(8);
    if (comm.rank() == 2) comm.Abort("disk is full");
    try {
      part->AllReduce(t, ReduceOp::kSum).Wait();
    } catch (const CommError&) {
      ++pending;
    }
    try {
      comm.Barrier();
    } catch (const CommError&) {
      ++later;
      throw;
    }
  });
  EXPECT_EQ(error, "disk is full");
  EXPECT_EQ(pending, 2);
  EXPECT_EQ(later, 2);
}

TEST(LocalTest, DisagreementIsNamed) {
  Tensor four = Ones(4);
  auto named = [](const std::string& error, const char* text) {
    EXPECT_NE(error.find(text), std::string::npos) << error;
  };
  std::string error = ErrorOf(2, [](Communicator& comm) {
    Tensor t = Ones(comm.rank() == 0 ? 4 : 5);
    comm.AllReduce(t, ReduceOp::kSum).Wait();
  });
  named(error, "f32[4]");
  named(error, "f32[5]");
  error = ErrorOf(2, [](Communicator& comm) {
    Tensor t = Ones(4);
    if (comm.rank() == 0) comm.AllReduce(t, ReduceOp::kSum).Wait();
    comm.Broadcast(t, 0).Wait();
  });
  named(error, "AllReduce");
  named(error, "Broadcast");
  error = ErrorOf(2, [](Communicator& comm) {
    Tensor t = Ones(4);
    comm.Broadcast(t, comm.rank()).Wait();
  });
  named(error, "from rank");
  error = ErrorOf(3, [](Communicator& comm) {
    Tensor t = Ones(4), u = Ones(4);
    if (comm.rank() == 0) comm.Exchange({{2, t.raw(), 16}}, {}).Wait();
    if (comm.rank() == 1) comm.Exchange({}, {}).Wait();
    if (comm.rank() == 2) comm.Exchange({}, {{0, u.raw(), 12}}).Wait();
  });
  named(error, "16 bytes but 12");
  error = ErrorOf(2, [](Communicator& comm) {
    Tensor t = Ones(4);
    if (comm.rank() == 0) {
      comm.Exchange({{1, t.raw(), 16}}, {}).Wait();
    } else {
      comm.Exchange({}, {}).Wait();
    }
  });
  named(error, "sends 1 messages to rank 1 but it receives 0");
}

// Who posted first must not take an operation for complete whose other side contradicts it.
TEST(LocalTest, AMismatchFailsBothSides) {
  std::atomic<int> failed{0};
  ErrorOf(2, [&](Communicator& comm) {
    Tensor t = Ones(4);
    if (comm.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    try {
      if (comm.rank() == 0) {
        comm.Exchange({{1, t.raw(), 16}}, {}).Wait();
      } else {
        comm.Exchange({}, {{0, t.raw(), 12}}).Wait();
      }
    } catch (const CommError&) {
      ++failed;
      throw;
    }
  });
  EXPECT_EQ(failed, 2);
}

TEST(LocalTest, ARankThatLeavesIsNamed) {
  for (bool late : {false, true}) {  // the others wait before or after it has left
    const std::string error = ErrorOf(3, [late](Communicator& comm) {
      if (comm.rank() == 1) {
        if (!late) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        return;
      }
      if (late) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      comm.Barrier();
    });
    EXPECT_NE(error.find("rank 1 ended without Barrier"), std::string::npos) << error;
  }
}

TEST(LocalTest, ADroppedPendingWorkIsAnError) {
  const std::string error = ErrorOf(2, [](Communicator& comm) {
    Tensor t = Ones(1 << 20);
    if (comm.rank() == 0) {
      comm.AllReduce(t, ReduceOp::kSum);  // Work dropped
      comm.Barrier();
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      comm.AllReduce(t, ReduceOp::kSum).Wait();
      comm.Barrier();
    }
  });
  EXPECT_NE(error.find("rank 0 of 2 dropped AllReduce"), std::string::npos) << error;
}

TEST(LocalTest, TimeoutNamesWhoIsMissing) {
  std::atomic<bool> over{false};
  const std::string error = ErrorOf(3,
                                    [&](Communicator& comm) {
                                      if (comm.rank() == 1) {
                                        while (!over)
                                          std::this_thread::sleep_for(std::chrono::milliseconds(1));
                                        return;
                                      }
                                      try {
                                        comm.Barrier();
                                      } catch (...) {
                                        over = true;
                                        throw;
                                      }
                                    },
                                    {.timeout_s = 0.05});
  EXPECT_NE(error.find("not issued by rank 1"), std::string::npos) << error;
}

// Ranks run far ahead of each other and still match operation by operation.
TEST(LocalTest, ManyRanksAndOperationsUnderSkew) {
  RunLocal(8, [](Communicator& comm) {
    constexpr int kRounds = 200;
    std::vector<Tensor> tensors;
    std::vector<Work> works;
    for (int k = 0; k < kRounds; ++k) {
      tensors.push_back(Ones(17));
      tensors.back().data<float>()[0] = static_cast<float>(k);
      works.push_back(comm.AllReduce(tensors.back(), ReduceOp::kSum));
    }
    for (int k = kRounds - 1; k >= 0; --k) {
      works[static_cast<size_t>(k)].Wait();
      EXPECT_EQ(tensors[static_cast<size_t>(k)].data<float>()[0], static_cast<float>(8 * k));
    }
  });
}

TEST(LocalTest, WorldArgumentsAreChecked) {
  EXPECT_THROW(LocalWorld(0), InvalidArgument);
  LocalWorld world(2);
  EXPECT_THROW(world.Rank(2), InvalidArgument);
  EXPECT_THROW(world.Rank(-1), InvalidArgument);
  EXPECT_EQ(parallel::ThreadsPerLocalRank(1), AvailableCores());
  EXPECT_EQ(parallel::ThreadsPerLocalRank(1000000), 1);
}

}  // namespace
}  // namespace longspan::test
