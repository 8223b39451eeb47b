// Forecasts of timelines: equal to what the same program takes on the simulated network, and errors
// for timelines that no program could have.
#include "parallel/context/predict.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>

#include "parallel/comm/local.h"
#include "parallel/comm/simulated.h"

namespace longspan::test {
namespace {

using parallel::NetworkOptions;
using parallel::Predict;
using parallel::Prediction;
using parallel::RankPrediction;
using parallel::Timeline;
using parallel::TimelineEvent;
using parallel::TimelineMessage;
using Kind = TimelineEvent::Kind;

TimelineEvent Post(int32_t transfer, std::vector<TimelineMessage> sends,
                   std::vector<TimelineMessage> recvs) {
  return {Kind::kPost, transfer, std::move(sends), std::move(recvs)};
}
TimelineEvent Wait(int32_t transfer) { return {Kind::kWait, transfer}; }
TimelineEvent Compute(double flops) {
  TimelineEvent event;
  event.flops = flops;
  return event;
}

NetworkOptions Options() { return {.intra = {1, 10}, .inter = {}, .flops_per_s = 100}; }

TEST(PredictTest, TransfersHideBehindComputing) {
  const auto hop = [](double flops) {
    return std::vector<Timeline>{{Post(7, {{1, 30}}, {}), Compute(flops), Wait(7)},
                                 {Post(7, {}, {{0, 30}}), Compute(flops), Wait(7), Compute(50)}};
  };
  const Prediction hidden = Predict(Options(), hop(600));  // 6 s; the message takes 4
  EXPECT_DOUBLE_EQ(hidden.ranks[0].finish_s, 6);
  EXPECT_DOUBLE_EQ(hidden.ranks[1].finish_s, 6.5);
  EXPECT_DOUBLE_EQ(hidden.ranks[1].compute_s, 6.5);
  EXPECT_DOUBLE_EQ(hidden.largest.exposed_s, 0);
  const Prediction exposed = Predict(Options(), hop(100));
  EXPECT_DOUBLE_EQ(exposed.ranks[0].finish_s, 1);
  EXPECT_DOUBLE_EQ(exposed.ranks[1].finish_s, 4.5);
  EXPECT_DOUBLE_EQ(exposed.ranks[1].exposed_s, 3);
  EXPECT_DOUBLE_EQ(exposed.largest.finish_s, 4.5);
  EXPECT_DOUBLE_EQ(exposed.largest.compute_s, 1.5);
  EXPECT_DOUBLE_EQ(exposed.largest.exposed_s, 3);
}

// Timelines of `ranks` ranks with `transfers` transfers, of which several are in flight.
std::vector<Timeline> RandomTimelines(int ranks, int transfers, std::mt19937_64& random) {
  std::vector<Timeline> timelines(static_cast<size_t>(ranks));
  std::vector<std::vector<int32_t>> pending(timelines.size());
  const auto compute_sometimes = [&](size_t r) {
    if (random() % 2 == 0) timelines[r].push_back(Compute(static_cast<double>(random() % 5000)));
  };
  const auto wait_for_one = [&](size_t r) {
    const size_t i = random() % pending[r].size();
    timelines[r].push_back(Wait(pending[r][i]));
    pending[r].erase(pending[r].begin() + static_cast<std::ptrdiff_t>(i));
    compute_sometimes(r);
  };
  for (int n = 0; n < transfers; ++n) {
    const int32_t transfer = 10 * n + 3;  // any numbers
    std::vector<TimelineEvent> posts(timelines.size());
    for (TimelineEvent& post : posts) post = Post(transfer, {}, {});
    for (uint64_t m = random() % (3 * timelines.size() + 1); m > 0; --m) {
      const size_t from = random() % timelines.size(), to = random() % timelines.size();
      const auto bytes = static_cast<int64_t>(random() % 4 == 0 ? 0 : random() % 3000);
      posts[from].sends.push_back({static_cast<int>(to), bytes});
      posts[to].recvs.push_back({static_cast<int>(from), bytes});
    }
    for (size_t r = 0; r < timelines.size(); ++r) {
      compute_sometimes(r);
      timelines[r].push_back(posts[r]);
      pending[r].push_back(transfer);
      while (!pending[r].empty() && random() % 3 != 0) wait_for_one(r);
    }
  }
  for (size_t r = 0; r < timelines.size(); ++r) {
    while (!pending[r].empty()) wait_for_one(r);
  }
  return timelines;
}

// Does what a timeline says, with real messages.
RankPrediction RunTimeline(parallel::SimulatedCommunicator& comm, const Timeline& timeline) {
  std::map<int32_t, parallel::Work> works;
  std::vector<std::vector<char>> buffers;
  const auto buffer = [&](int64_t bytes) -> void* {
    buffers.emplace_back(static_cast<size_t>(bytes));
    return bytes == 0 ? nullptr : buffers.back().data();
  };
  for (const TimelineEvent& event : timeline) {
    if (event.kind == Kind::kCompute) {
      comm.Computed(event.flops);
    } else if (event.kind == Kind::kWait) {
      works.at(event.transfer).Wait();
    } else {
      std::vector<parallel::Send> sends;
      std::vector<parallel::Recv> recvs;
      for (const auto& m : event.sends) sends.push_back({m.peer, buffer(m.bytes), m.bytes});
      for (const auto& m : event.recvs) recvs.push_back({m.peer, buffer(m.bytes), m.bytes});
      works[event.transfer] = comm.Exchange(std::move(sends), std::move(recvs));
    }
  }
  const RankPrediction times{comm.now_s(), comm.compute_s(), comm.exposed_s()};
  return times;
}

TEST(PredictTest, EqualsWhatTheSimulatedNetworkMeasures) {
  constexpr uint64_t kSeed = 20261;
  std::mt19937_64 random(kSeed);
  double exposed = 0;
  for (int round = 0; round < 60; ++round) {
    const int ranks = 1 + static_cast<int>(random() % 8);
    NetworkOptions options;
    options.intra = {1e-6 * static_cast<double>(random() % 10), 1e9};
    options.inter = {1e-5, 2.3e8};
    options.ranks_per_node = static_cast<int>(random() % 5);
    options.flops_per_s = 1.7e9;
    SCOPED_TRACE(Str("seed ", kSeed, ", round ", round, ", ", ranks, " ranks, nodes of ",
                     options.ranks_per_node));
    const auto timelines = RandomTimelines(ranks, 1 + static_cast<int>(random() % 12), random);
    const Prediction predicted = Predict(options, timelines);
    std::vector<RankPrediction> measured(timelines.size());
    parallel::SimulatedNetwork network(ranks, options);
    parallel::RunLocal(ranks, [&](parallel::Communicator& comm) {
      parallel::SimulatedCommunicator simulated(comm, network);
      const auto r = static_cast<size_t>(comm.rank());
      measured[r] = RunTimeline(simulated, timelines[r]);
    });
    double last = 0;
    for (size_t r = 0; r < measured.size(); ++r) {
      const auto close = [&](double actual, double expected) {
        EXPECT_NEAR(actual, expected, 1e-12 * expected) << "rank " << r;
      };
      close(predicted.ranks[r].finish_s, measured[r].finish_s);
      close(predicted.ranks[r].compute_s, measured[r].compute_s);
      close(predicted.ranks[r].exposed_s, measured[r].exposed_s);
      exposed += measured[r].exposed_s;
      last = std::max(last, measured[r].finish_s);
    }
    EXPECT_NEAR(predicted.largest.finish_s, last, 1e-12 * last);
  }
  EXPECT_GT(exposed, 0) << "nobody ever waited";
}

std::string ErrorOf(const std::vector<Timeline>& timelines, NetworkOptions options = Options()) {
  try {
    Predict(options, timelines);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "no error";
}

void ExpectRefused(const std::vector<Timeline>& timelines, const std::string& text) {
  const std::string error = ErrorOf(timelines);
  EXPECT_NE(error.find(text), std::string::npos) << error;
}

TEST(PredictTest, TimelinesThatDoNotFitTogetherAreRefused) {
  ExpectRefused({{Post(1, {{1, 8}}, {})}, {Post(1, {}, {})}},
                "rank 0 sends 8 bytes to rank 1 in transfer 1, which does not receive them");
  ExpectRefused({{Post(1, {}, {})}, {Post(1, {}, {{0, 8}})}},
                "rank 1 receives 8 bytes from rank 0 in transfer 1, which does not send them");
  ExpectRefused({{Post(1, {{1, 8}}, {})}, {Post(1, {}, {{0, 9}})}},
                "rank 0 sends 8 bytes to rank 1 in transfer 1, which expects 9");
  ExpectRefused({{Post(1, {{1, 8}, {1, 9}}, {})}, {Post(1, {}, {{0, 9}, {0, 8}})}},
                "rank 0 sends 8 bytes to rank 1 in transfer 1, which expects 9");
  // The message of a third rank hides nothing.
  ExpectRefused({{Post(1, {}, {})}, {Post(1, {}, {{2, 8}})}, {Post(1, {{0, 8}}, {})}},
                "rank 2 sends 8 bytes to rank 0 in transfer 1, which does not receive them");
  ExpectRefused({{Post(1, {{1, 8}}, {})}, {}}, "rank 1 posts 0 transfers and rank 0 posts 1");
  ExpectRefused({{}, {Post(1, {{0, 8}}, {})}}, "rank 1 posts transfer 1 after all 0 transfers");
  ExpectRefused({{Post(1, {}, {}), Post(2, {}, {})}, {Post(2, {}, {}), Post(1, {}, {})}},
                "rank 1 posts transfer 2 where rank 0 posts transfer 1");
  ExpectRefused({{Post(1, {}, {}), Post(1, {}, {})}}, "rank 0 posts transfer 1 twice");
  ExpectRefused({{Wait(4)}}, "rank 0 waits for transfer 4, which it has not posted");
  ExpectRefused({{Post(4, {}, {})}, {Wait(4), Post(4, {}, {})}},
                "rank 1 waits for transfer 4, which it has not posted");
  ExpectRefused({{Post(1, {{2, 8}}, {})}, {Post(1, {}, {})}}, "with peer 2 in transfer 1");
  ExpectRefused({{Post(1, {}, {{-1, 8}})}}, "with peer -1 in transfer 1");
  ExpectRefused({{Post(1, {{0, -8}}, {})}}, "a send of -8 bytes");
  ExpectRefused({{Compute(-1)}}, "computes -1 operations");
  ExpectRefused({{Compute(std::nan(""))}}, "computes nan operations");
  ExpectRefused({}, "no ranks");
  NetworkOptions options = Options();
  options.compute = parallel::ComputeClock::kCpuTime;
  EXPECT_NE(ErrorOf({{}}, options).find("kModelled"), std::string::npos);
  EXPECT_NE(ErrorOf({{}}, NetworkOptions()).find("intra.bytes_per_s"), std::string::npos);
}

// A dense ring of many ranks, whose time is known.
TEST(PredictTest, ManyRanks) {
  constexpr int kRanks = 512;
  std::vector<Timeline> timelines(kRanks);
  for (int r = 0; r < kRanks; ++r) {
    for (int32_t hop = 0; hop + 1 < kRanks; ++hop) {
      Timeline& t = timelines[static_cast<size_t>(r)];
      t.push_back(Post(hop, {{(r + 1) % kRanks, 20}}, {{(r + kRanks - 1) % kRanks, 20}}));
      t.push_back(Compute(100));
      t.push_back(Wait(hop));
    }
  }
  const Prediction p = Predict(Options(), timelines);
  EXPECT_DOUBLE_EQ(p.largest.finish_s, (kRanks - 1) * 3.0);
  EXPECT_DOUBLE_EQ(p.ranks[17].finish_s, (kRanks - 1) * 3.0);
  EXPECT_DOUBLE_EQ(p.largest.exposed_s, (kRanks - 1) * 2.0);
}

}  // namespace
}  // namespace longspan::test
