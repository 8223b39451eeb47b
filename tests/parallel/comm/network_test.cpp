// The rules of the network that exists on paper, against times worked out by hand.
#include "parallel/comm/network.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "ops/core/error.h"

namespace longspan::test {
namespace {

using parallel::CommOp;
using parallel::NetworkMessage;
using parallel::NetworkOptions;
using parallel::NetworkTimer;

using Sends = std::vector<std::vector<NetworkMessage>>;

// 1 s of latency and 10 bytes/s inside a node; 5 s and 2 bytes/s between nodes.
NetworkOptions Options(int ranks_per_node = 0) {
  return {.intra = {1, 10}, .inter = {5, 2}, .ranks_per_node = ranks_per_node, .flops_per_s = 1};
}

NetworkTimer Timer(int ranks, const NetworkOptions& options = Options()) {
  std::vector<int> all(static_cast<size_t>(ranks));
  std::iota(all.begin(), all.end(), 0);
  return NetworkTimer(options, all);
}

void ExpectTimes(const std::vector<double>& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) EXPECT_DOUBLE_EQ(actual[i], expected[i]) << i;
}

TEST(NetworkTest, AMessageTakesLatencyAndItsLength) {
  NetworkTimer timer = Timer(3);
  // Rank 1 sends from 7 on; whoever gets nothing waits for nothing.
  ExpectTimes(timer.Exchange(std::vector<double>{2, 7, 3}, Sends{{}, {{2, 20}}, {}}),
              {2, 7, 7 + 1 + 2});
  // It makes no difference that the receiver comes late.
  ExpectTimes(timer.Exchange(std::vector<double>{100, 100, 500}, Sends{{{2, 20}}, {}, {}}),
              {100, 100, 500});
}

TEST(NetworkTest, TheSendersPortTakesOneMessageAtATime) {
  NetworkTimer timer = Timer(3);
  // The second message starts when the first has left the port, not when it has arrived.
  ExpectTimes(timer.Exchange(std::vector<double>{0, 0, 0}, Sends{{{1, 30}, {2, 20}}, {}, {}}),
              {0, 1 + 3, 3 + 1 + 2});
}

TEST(NetworkTest, SendersShareTheReceiversPort) {
  NetworkTimer timer = Timer(4);
  const std::vector<double> ready = {0, 0, 0, 0.5};
  ExpectTimes(timer.Exchange(ready, Sends{{}, {{0, 10}}, {{0, 20}}, {{0, 10}}}),
              {1 + 1 + 2 + 1, 0, 0, 0.5});
  // The messages of the first operation are on their way still: rank 0's port is busy until 5.
  ExpectTimes(timer.Exchange(ready, Sends{{}, {{0, 10}}, {}, {}}), {6, 0, 0, 0.5});
}

TEST(NetworkTest, TheEarlierStartPassesFirstThenTheLowerRank) {
  // Two messages of unequal length with a gap between them: who is first decides how much of the
  // gap is used.
  const auto end = [](double ready_1, double ready_2) {
    NetworkTimer timer = Timer(3);
    timer.Exchange(std::vector<double>{ready_1, ready_2, 0}, Sends{{{2, 50}}, {{2, 1}}, {}});
    // The port of rank 2 is free when both are through; a third message shows when that is.
    return timer.Exchange(std::vector<double>{0, 0, 0}, Sends{{}, {{2, 1}}, {}})[2];
  };
  EXPECT_DOUBLE_EQ(end(0, 0), 1 + 5 + 0.1 + 0.1);
  EXPECT_DOUBLE_EQ(end(3, 0), 3 + 1 + 5 + 0.1);      // the short one fits in before the long one
  EXPECT_DOUBLE_EQ(end(0, 20), 20 + 1 + 0.1 + 0.1);  // and here comes after it
}

TEST(NetworkTest, PortsStayBusyFromOneOperationToTheNext) {
  NetworkTimer timer = Timer(2);
  ExpectTimes(timer.Exchange(std::vector<double>{0, 0}, Sends{{{1, 100}}, {}}), {0, 11});
  ExpectTimes(timer.Exchange(std::vector<double>{1, 1}, Sends{{{1, 10}}, {{0, 10}}}),
              {1 + 1 + 1, 10 + 1 + 1});
  timer.Reset();
  ExpectTimes(timer.Exchange(std::vector<double>{1, 1}, Sends{{{1, 10}}, {}}), {1, 3});
}

TEST(NetworkTest, LinksWithinAndBetweenNodesHaveTheirOwnPorts) {
  NetworkTimer timer = Timer(4, Options(/*ranks_per_node=*/2));
  // Rank 0 to its neighbour and to the other node at once; ranks 0 and 1 to rank 3 in turn.
  ExpectTimes(
      timer.Exchange(std::vector<double>{0, 0, 0, 0}, Sends{{{3, 10}, {1, 10}}, {{3, 10}}, {}, {}}),
      {0, 1 + 1, 0, 5 + 5 + 5});
  // A communicator of ranks 1 and 2, which are on different nodes.
  NetworkTimer part(Options(2), {1, 2});
  ExpectTimes(part.Exchange(std::vector<double>{0, 0}, Sends{{{1, 10}}, {}}), {0, 5 + 5});
}

TEST(NetworkTest, MessagesToOneselfAndOfNothingTakeNoTime) {
  NetworkTimer timer = Timer(2);
  ExpectTimes(timer.Exchange(std::vector<double>{3, 4}, Sends{{{0, 1000}, {1, 0}}, {{1, 5}}}),
              {3, 4});
  ExpectTimes(timer.Exchange(std::vector<double>{3, 4}, Sends{{{1, 10}}, {}}), {3, 5});
}

TEST(NetworkTest, CollectivesHaveTheCostsOfARing) {
  const std::vector<double> ready = {0, 3, 1, 2};
  const auto time = [&](CommOp op, int64_t bytes, const NetworkOptions& options) {
    NetworkTimer timer = Timer(4, options);
    return timer.Collective(op, bytes, ready) - 3;  // all wait for rank 1
  };
  EXPECT_DOUBLE_EQ(time(CommOp::kAllReduce, 80, Options()), 2 * 3 * (1 + 2.0));
  EXPECT_DOUBLE_EQ(time(CommOp::kAllGather, 80, Options()), 3 * (1 + 8.0));
  EXPECT_DOUBLE_EQ(time(CommOp::kReduceScatter, 80, Options()), 3 * (1 + 8.0));
  EXPECT_DOUBLE_EQ(time(CommOp::kBroadcast, 80, Options()), 3 * 1 + 8.0);
  EXPECT_DOUBLE_EQ(time(CommOp::kBarrier, 0, Options()), 2 * 3 * 1);
  // Two nodes: the slowest link of the ring decides.
  EXPECT_DOUBLE_EQ(time(CommOp::kAllReduce, 80, Options(2)), 2 * 3 * (5 + 10.0));
  NetworkOptions quick = Options(2);
  quick.inter = {0.5, 100};  // now that is the one inside a node
  EXPECT_DOUBLE_EQ(time(CommOp::kAllGather, 80, quick), 3 * (1 + 8.0));
  NetworkTimer across(Options(2), {0, 2});  // no two ranks on one node
  EXPECT_DOUBLE_EQ(across.Collective(CommOp::kAllGather, 8, std::vector<double>{0, 0}), 5 + 4.0);
  NetworkTimer alone = Timer(1);
  EXPECT_DOUBLE_EQ(alone.Collective(CommOp::kAllReduce, 80, std::vector<double>{7}), 7);
}

TEST(NetworkTest, CollectivesAndMessagesWaitForEachOther) {
  NetworkTimer timer = Timer(2);
  timer.Exchange(std::vector<double>{0, 0}, Sends{{{1, 100}}, {}});  // until 11
  EXPECT_DOUBLE_EQ(timer.Collective(CommOp::kBarrier, 0, std::vector<double>{0, 0}), 11 + 2);
  ExpectTimes(timer.Exchange(std::vector<double>{0, 0}, Sends{{{1, 10}}, {}}), {0, 13 + 1 + 1});
}

TEST(NetworkTest, BadOptionsAreNamed) {
  const auto refused = [](auto change, const std::string& field) {
    NetworkOptions options = Options(2);
    change(options);
    try {
      CheckNetwork(options);
      ADD_FAILURE() << field;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(field), std::string::npos) << e.what();
    }
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  refused([](NetworkOptions& o) { o.intra.latency_s = -1; }, "intra.latency_s is -1");
  refused([=](NetworkOptions& o) { o.inter.latency_s = nan; }, "inter.latency_s");
  refused([](NetworkOptions& o) { o.intra.bytes_per_s = 0; }, "intra.bytes_per_s is 0");
  refused([=](NetworkOptions& o) { o.inter.bytes_per_s = nan; }, "inter.bytes_per_s");
  refused([](NetworkOptions& o) { o.ranks_per_node = -1; }, "ranks_per_node is -1");
  refused([](NetworkOptions& o) { o.flops_per_s = 0; }, "flops_per_s is 0");
  // What is not used need not be given.
  NetworkOptions one_node = Options();
  one_node.inter = {};
  one_node.compute = parallel::ComputeClock::kCpuTime;
  one_node.flops_per_s = 0;
  CheckNetwork(one_node);
}

}  // namespace
}  // namespace longspan::test
