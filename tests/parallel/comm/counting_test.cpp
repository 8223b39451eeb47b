#include "parallel/comm/counting.h"

#include <gtest/gtest.h>

#include "ops/core/context.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"

namespace longspan::test {
namespace {

using parallel::CommOp;
using parallel::Communicator;
using parallel::CountingCommunicator;
using parallel::ReduceOp;

TEST(CountingTest, BytesFollowTheStatedConvention) {
  parallel::RunLocal(3, [](Communicator& comm) {
    Context ctx(ContextOptions{.device = {}, .threads = 1});
    CountingCommunicator counting(comm);
    Tensor five = ctx.Zeros({5}, DType::kF32), fifteen = ctx.Zeros({15}, DType::kF32);
    counting.AllReduce(five, ReduceOp::kSum).Wait();
    counting.AllGather(five, fifteen).Wait();
    counting.ReduceScatter(fifteen, five).Wait();
    counting.Broadcast(five, 1).Wait();
    const int next = (comm.rank() + 1) % 3, previous = (comm.rank() + 2) % 3;
    counting
        .Exchange({{next, fifteen.raw(), 8}, {comm.rank(), fifteen.raw() + 8, 4}},
                  {{previous, five.raw(), 8}, {comm.rank(), five.raw() + 8, 4}})
        .Wait();
    counting.Barrier();
    const auto counts = counting.counts();
    EXPECT_EQ(counts[CommOp::kAllReduce].bytes, 2 * 2 * 20 / 3);
    EXPECT_EQ(counts[CommOp::kAllGather].bytes, 2 * 20);
    EXPECT_EQ(counts[CommOp::kReduceScatter].bytes, 2 * 20);
    EXPECT_EQ(counts[CommOp::kBroadcast].bytes, comm.rank() == 1 ? 2 * 20 : 0);
    EXPECT_EQ(counts[CommOp::kExchange].bytes, 8);
    EXPECT_EQ(counts[CommOp::kBarrier].bytes, 0);
    for (CommOp op : {CommOp::kAllReduce, CommOp::kAllGather, CommOp::kReduceScatter,
                      CommOp::kBroadcast, CommOp::kExchange, CommOp::kBarrier}) {
      EXPECT_EQ(counts[op].calls, 1) << ToString(op);
    }
    EXPECT_EQ(counts.Total().calls, 6);
    EXPECT_EQ(counts.Total().bytes, 26 + 40 + 40 + (comm.rank() == 1 ? 40 : 0) + 8);
    counting.ResetCounts();
    EXPECT_EQ(counting.counts().Total().calls, 0);
    EXPECT_EQ(counting.counts().Total().bytes, 0);
  });
}

// What ranks tell each other counts apart, also through a decorator and from a part of the ranks.
TEST(CountingTest, ControlTrafficCountsApart) {
  using parallel::Traffic;
  parallel::RunLocal(4, [](Communicator& comm) {
    Context ctx(ContextOptions{.device = {}, .threads = 1});
    CountingCommunicator world(comm);
    CountingCommunicator outer(static_cast<Communicator&>(world));
    const auto half = outer.Split(comm.rank() / 2, comm.rank());
    Tensor one = ctx.Zeros({1}, DType::kF64), two = ctx.Zeros({2}, DType::kF64);
    Tensor four = ctx.Zeros({4}, DType::kF64);
    half->AllGather(one, two).Wait();  // 8 bytes
    {
      const parallel::TrafficScope routed(*half, Traffic::kRouted);
      {
        const parallel::ControlTraffic control(*half);
        half->AllGather(two, four).Wait();  // 16 bytes of control
      }
      half->AllReduce(two, ReduceOp::kSum).Wait();  // 16 bytes, routed again
    }
    half->AllReduce(one, ReduceOp::kSum).Wait();  // 8 bytes
    for (const CountingCommunicator* counting : {&world, &outer}) {
      const auto counts = counting->counts();
      EXPECT_EQ(counts.control.calls, 1);
      EXPECT_EQ(counts.control.bytes, 16);
      EXPECT_EQ(counts.bytes_of[static_cast<size_t>(Traffic::kControl)], 16);
      EXPECT_EQ(counts.bytes_of[static_cast<size_t>(Traffic::kRouted)], 16);
      EXPECT_EQ(counts.bytes_of[static_cast<size_t>(Traffic::kPayload)], 16);
      EXPECT_EQ(counts[CommOp::kAllGather].bytes, 8);
      EXPECT_EQ(counts[CommOp::kAllReduce].calls, 2);
      EXPECT_EQ(counts.Total().bytes, 32);
    }
    world.ResetCounts();
    EXPECT_EQ(world.counts().control.bytes, 0);
  });
}

TEST(CountingTest, OneRankSendsNothing) {
  parallel::SelfCommunicator self;
  CountingCommunicator counting(self);
  Context ctx;
  Tensor t = ctx.Zeros({6}, DType::kF64), u = ctx.Zeros({6}, DType::kF64);
  counting.AllReduce(t, ReduceOp::kSum).Wait();
  counting.AllGather(t, u).Wait();
  counting.Exchange({{0, t.raw(), 48}}, {{0, u.raw(), 48}}).Wait();
  EXPECT_EQ(counting.counts().Total().bytes, 0);
  EXPECT_EQ(counting.counts().Total().calls, 3);
}

TEST(CountingTest, PartsCountForThemselvesAndTheirAncestors) {
  parallel::RunLocal(4, [](Communicator& comm) {
    Context ctx(ContextOptions{.device = {}, .threads = 1});
    CountingCommunicator world(comm);
    const auto part = world.Split(comm.rank() / 2, comm.rank());
    auto* counting = dynamic_cast<CountingCommunicator*>(part.get());
    ASSERT_NE(counting, nullptr);
    Tensor t = ctx.Zeros({4}, DType::kF32);
    part->AllReduce(t, ReduceOp::kSum).Wait();
    EXPECT_EQ(counting->counts()[CommOp::kAllReduce].bytes, 16);
    EXPECT_EQ(world.counts()[CommOp::kAllReduce].bytes, 16);
    world.AllReduce(t, ReduceOp::kSum).Wait();
    EXPECT_EQ(counting->counts()[CommOp::kAllReduce].bytes, 16);
    EXPECT_EQ(world.counts()[CommOp::kAllReduce].bytes, 16 + 24);
    EXPECT_EQ(world.counts()[CommOp::kSplit].calls, 1);
  });
}

TEST(CountingTest, RefusedCallsDoNotCount) {
  parallel::SelfCommunicator self;
  CountingCommunicator counting(self);
  EXPECT_THROW(counting.AllReduce(Tensor(), ReduceOp::kSum), InvalidArgument);
  EXPECT_EQ(counting.counts().Total().calls, 0);
  EXPECT_TRUE(counting.RecentOperations().empty());
}

TEST(CountingTest, RecentOperationsShowWhatIsPending) {
  parallel::LocalWorld world(2);
  CountingCommunicator a(world.Rank(0)), b(world.Rank(1));
  Context ctx;
  Tensor t = ctx.Zeros({4}, DType::kF32), u = ctx.Zeros({4}, DType::kF32);
  auto of_a = a.AllReduce(t, ReduceOp::kSum), of_b = b.AllReduce(u, ReduceOp::kSum);
  of_a.Wait();
  of_b.Wait();
  auto pending = a.Exchange({{1, t.raw(), 16}}, {});
  auto lines = a.RecentOperations();
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0].find("#0 AllReduce: f32[4], done in "), 0u) << lines[0];
  EXPECT_EQ(lines[1].find("#1 Exchange: 1 sends of 16 bytes, 0 receives of 0 bytes, pending for "),
            0u)
      << lines[1];
  b.Exchange({}, {{0, u.raw(), 16}}).Wait();
  EXPECT_TRUE(pending.Done());
  EXPECT_NE(a.RecentOperations()[1].find("done in"), std::string::npos);

  for (int i = 0; i < CountingCommunicator::kRecentOperations; ++i) {
    auto first = a.AllReduce(t, ReduceOp::kSum);
    b.AllReduce(u, ReduceOp::kSum).Wait();
    first.Wait();
  }
  lines = a.RecentOperations();
  ASSERT_EQ(lines.size(), size_t{CountingCommunicator::kRecentOperations});
  EXPECT_EQ(lines[0].find("#2 AllReduce"), 0u) << lines[0];
  EXPECT_NE(lines.back().find("done in"), std::string::npos);
}

TEST(CountingTest, FailuresPassThrough) {
  parallel::LocalWorld world(2);
  CountingCommunicator a(world.Rank(0));
  Context ctx;
  Tensor t = ctx.Zeros({4}, DType::kF32);
  auto work = a.AllReduce(t, ReduceOp::kSum);
  world.Fail("rank 1 is gone");
  EXPECT_THROW(work.Wait(), CommError);
  EXPECT_THROW(a.Barrier(), CommError);
  EXPECT_THROW(a.Abort("enough"), CommError);
}

}  // namespace
}  // namespace longspan::test
