#include "parallel/zero/grad_reducer.h"

#include <gtest/gtest.h>

#include "ops/core/context.h"
#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"

namespace longspan::test {
namespace {

using parallel::CommOp;
using parallel::Communicator;
using parallel::CountingCommunicator;
using parallel::GradReducer;

// Buckets of different sizes and dtypes; element j of bucket i on rank r is (i + 1) * j + r.
std::vector<Tensor> Buckets(Context& ctx, int rank) {
  std::vector<Tensor> buckets;
  for (int64_t n : {1000, 0, 70001, 3}) {
    const double i = static_cast<double>(buckets.size());
    Tensor t = ctx.Empty({n}, buckets.size() == 2 ? DType::kF64 : DType::kF32);
    DispatchFloat(t.dtype(), "test", [&]<class T>() {
      for (int64_t j = 0; j < n; ++j) {
        t.data<T>()[j] = T(static_cast<float>((i + 1) * static_cast<double>(j) + rank));
      }
    });
    buckets.push_back(t);
  }
  return buckets;
}

void ExpectSums(const std::vector<Tensor>& buckets, int ranks) {
  for (size_t i = 0; i < buckets.size(); ++i) {
    DispatchFloat(buckets[i].dtype(), "test", [&]<class T>() {
      for (int64_t j = 0; j < buckets[i].numel(); ++j) {
        const double expected =
            ranks * static_cast<double>(i + 1) * static_cast<double>(j) + ranks * (ranks - 1) / 2.0;
        ASSERT_EQ(static_cast<double>(buckets[i].data<T>()[j]), expected) << i << " " << j;
      }
    });
  }
}

TEST(GradReducerTest, SumsEveryBucketStepAfterStep) {
  for (int ranks : {1, 2, 3}) {
    parallel::RunLocal(ranks, [ranks](Communicator& comm) {
      Context ctx(ContextOptions{.device = {}, .threads = 1});
      const auto buckets = Buckets(ctx, comm.rank());
      GradReducer reducer(comm, buckets);
      for (int step = 0; step < 2; ++step) {
        const auto fresh = Buckets(ctx, comm.rank());
        for (size_t i = 0; i < buckets.size(); ++i) {
          std::copy_n(fresh[i].raw(), fresh[i].bytes(), buckets[i].raw());
        }
        for (int i = reducer.num_buckets() - 1; i >= 0; --i) reducer.BucketReady(i);
        reducer.Finish();
        ExpectSums(buckets, ranks);
      }
    });
  }
}

TEST(GradReducerTest, ReductionsStartDuringBackwardLastBucketFirst) {
  parallel::RunLocal(2, [](Communicator& comm) {
    Context ctx(ContextOptions{.device = {}, .threads = 1});
    CountingCommunicator counting(comm);
    const auto buckets = Buckets(ctx, comm.rank());
    GradReducer reducer(counting, buckets);
    auto started = [&] { return counting.counts()[CommOp::kAllReduce].calls; };
    reducer.BucketReady(3);
    EXPECT_EQ(started(), 1);
    reducer.BucketReady(2);
    EXPECT_EQ(started(), 2) << "must not wait for Finish";
    reducer.BucketReady(1);
    EXPECT_EQ(started(), 2) << "an empty bucket costs nothing";
    reducer.BucketReady(0);
    const auto order = counting.RecentOperations();
    ASSERT_EQ(order.size(), 3u);
    EXPECT_NE(order[0].find("f32[3]"), std::string::npos) << order[0];
    EXPECT_NE(order[1].find("f64[70001]"), std::string::npos) << order[1];
    EXPECT_NE(order[2].find("f32[1000]"), std::string::npos) << order[2];
    reducer.Finish();
    ExpectSums(buckets, 2);
    EXPECT_EQ(counting.counts()[CommOp::kAllReduce].bytes, 12 + 8 * 70001 + 4000);
  });
}

// Ranks may finish their buckets in different orders (a tied weight, a rank without tokens); what
// they issue must still agree.
TEST(GradReducerTest, OrderOfReadinessMayDifferBetweenRanks) {
  parallel::RunLocal(3, [](Communicator& comm) {
    Context ctx(ContextOptions{.device = {}, .threads = 1});
    const auto buckets = Buckets(ctx, comm.rank());
    GradReducer reducer(comm, buckets);
    const std::vector<std::vector<int>> orders = {{3, 2, 1, 0}, {0, 1, 2, 3}, {2, 0, 3, 1}};
    for (int i : orders[static_cast<size_t>(comm.rank())]) reducer.BucketReady(i);
    reducer.Finish();
    ExpectSums(buckets, 3);
  });
}

TEST(GradReducerTest, AMissedBucketIsNamed) {
  for (int missed = 0; missed < 4; ++missed) {
    parallel::RunLocal(2, [missed](Communicator& comm) {
      Context ctx(ContextOptions{.device = {}, .threads = 1});
      GradReducer reducer(comm, Buckets(ctx, comm.rank()));
      for (int i = 3; i >= 0; --i) {
        if (i != missed) reducer.BucketReady(i);
      }
      try {
        reducer.Finish();
        ADD_FAILURE() << "bucket " << missed << " was missed silently";
      } catch (const InvalidArgument& e) {
        EXPECT_NE(std::string(e.what()).find(Str("bucket ", missed, " was never made ready")),
                  std::string::npos)
            << e.what();
      }
    });
  }
  parallel::SelfCommunicator self;
  Context ctx;
  GradReducer reducer(self, Buckets(ctx, 0));
  EXPECT_THROW(reducer.Finish(), InvalidArgument) << "a step without any backward";
}

TEST(GradReducerTest, BadUseIsRefused) {
  parallel::SelfCommunicator self;
  Context ctx;
  GradReducer reducer(self, Buckets(ctx, 0));
  EXPECT_THROW(reducer.BucketReady(4), InvalidArgument);
  EXPECT_THROW(reducer.BucketReady(-1), InvalidArgument);
  reducer.BucketReady(3);
  EXPECT_THROW(reducer.BucketReady(3), InvalidArgument);
  reducer.BucketReady(0);
  EXPECT_THROW(reducer.BucketReady(0), InvalidArgument) << "ready but not issued yet";
  EXPECT_THROW(GradReducer(self, {Tensor()}), InvalidArgument);
  EXPECT_THROW(GradReducer(self, {ctx.Zeros({4}, DType::kBF16)}), InvalidArgument);
  EXPECT_THROW(GradReducer(self, {ctx.Zeros({2, 2}, DType::kF32)}), InvalidArgument);
  GradReducer empty(self, {});
  empty.Finish();
}

TEST(GradReducerTest, ScalarsAreSummedInF64) {
  parallel::RunLocal(3, [](Communicator& comm) {
    GradReducer reducer(comm, {});
    const double tiny = 1e-12 * (comm.rank() + 1);
    EXPECT_EQ(reducer.SumScalars({1.0 + comm.rank(), 0.0, 4096.0}),
              (std::vector<double>{6.0, 0.0, 12288.0}));
    EXPECT_NEAR(reducer.SumScalars({comm.rank() == 0 ? 1.0 : tiny})[0], 1.0 + 5e-12, 1e-15);
    EXPECT_TRUE(reducer.SumScalars({}).empty());
  });
}

}  // namespace
}  // namespace longspan::test
