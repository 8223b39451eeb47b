// Flat shards: their borders, sums into them, and wholes from them, against sums by hand.
#include <gtest/gtest.h>

#include "ops/core/context.h"
#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/comm/self.h"
#include "parallel/zero/flat_shard.h"
#include "parallel/zero/shard_gather.h"
#include "parallel/zero/shard_groups.h"
#include "parallel/zero/shard_reducer.h"

namespace longspan::test {
namespace {

using parallel::CommOp;
using parallel::Communicator;
using parallel::CountingCommunicator;
using parallel::FlatShard;
using parallel::ShardGather;
using parallel::ShardGroups;
using parallel::ShardReducer;

TEST(FlatShardTest, PartsCoverEverythingOnceInOrder) {
  for (const int64_t n : {0, 1, 3, 7, 8, 9, 63, 64, 65, 1000, 70001}) {
    for (const int64_t parts : {1, 2, 3, 4, 7, 8, 64}) {
      const FlatShard cut{n, parts};
      int64_t next = 0;
      for (int64_t r = 0; r < parts; ++r) {
        EXPECT_EQ(cut.begin(r), next);
        EXPECT_LE(cut.end(r) - cut.begin(r), cut.slot());
        // What the kernels and the collectives see as rank r's slot begins where its part does.
        if (cut.end(r) > cut.begin(r)) {
          EXPECT_EQ(cut.begin(r), r * cut.slot());
        }
        next = cut.end(r);
      }
      EXPECT_EQ(next, n);
      EXPECT_EQ(cut.padded(), cut.slot() * parts);
      EXPECT_LT(cut.padded() - n, parts == 1 ? 1 : 8 * parts) << n << " on " << parts;
      if (parts > 1) {
        EXPECT_EQ(cut.slot() % 8, 0);
      }
    }
  }
}

TEST(ShardGroupsTest, NeighboursShareAndEveryoneMeetsTheirCopies) {
  parallel::RunLocal(6, [](Communicator& world) {
    const ShardGroups all_groups(world, 0);
    ShardGroups all(world, 6), pairs(world, 2);
    EXPECT_EQ(all.parts(), 6);
    EXPECT_EQ(all.part(), world.rank());
    EXPECT_EQ(all.across(), nullptr);
    EXPECT_EQ(all.copies(), 1);
    EXPECT_EQ(pairs.parts(), 2);
    EXPECT_EQ(pairs.part(), world.rank() % 2);
    EXPECT_EQ(pairs.copy(), world.rank() / 2);
    EXPECT_EQ(pairs.copies(), 3);
    const auto sum = [&](Communicator& comm) {
      return parallel::AllReduceValue(comm, int64_t{1} << (4 * world.rank()),
                                      parallel::ReduceOp::kSum);
    };
    EXPECT_EQ(sum(pairs.inside()), int64_t{0x11} << (world.rank() / 2 * 8));
    EXPECT_EQ(sum(*pairs.across()), int64_t{0x10101} << (world.rank() % 2 * 4));
    EXPECT_THROW(ShardGroups(world, 4), InvalidArgument);
    EXPECT_THROW(ShardGroups(world, 12), InvalidArgument);
  });
}

// Sizes of the tensors of each bucket; the second has none, the last two.
const std::vector<std::vector<int64_t>> kSizes = {{1000}, {}, {3}, {40, 17}};

// What rank `rank` adds to element j of tensor i of bucket b in pass p.
double Gradient(size_t b, size_t i, int64_t j, int rank, int pass) {
  return static_cast<double>(j) * (1 + static_cast<double>(b)) + 100 * static_cast<double>(i) +
         rank * rank + 7 * pass * (rank + 1);
}

std::vector<Tensor> Whole(Context& ctx, size_t b, int parts, int rank, int pass) {
  std::vector<Tensor> whole;
  for (size_t i = 0; i < kSizes[b].size(); ++i) {
    Tensor t = ctx.Zeros({FlatShard{kSizes[b][i], parts}.padded()}, DType::kF64);
    for (int64_t j = 0; j < kSizes[b][i]; ++j) {
      t.data<double>()[j] = Gradient(b, i, j, rank, pass);
    }
    whole.push_back(t);
  }
  return whole;
}

std::vector<std::vector<Tensor>> Parts(Context& ctx, int parts) {
  std::vector<std::vector<Tensor>> all;
  for (const auto& sizes : kSizes) {
    all.emplace_back();
    for (const int64_t n : sizes) {
      // Garbage, which the first pass must replace.
      Tensor t = ctx.Empty({FlatShard{n, parts}.slot()}, DType::kF64);
      for (int64_t j = 0; j < t.numel(); ++j) t.data<double>()[j] = 1e6;
      all.back().push_back(t);
    }
  }
  return all;
}

void ExpectSums(const std::vector<std::vector<Tensor>>& parts, const ShardGroups& groups, int ranks,
                int passes) {
  for (size_t b = 0; b < kSizes.size(); ++b) {
    for (size_t i = 0; i < kSizes[b].size(); ++i) {
      const FlatShard cut{kSizes[b][i], groups.parts()};
      for (int64_t j = cut.begin(groups.part()); j < cut.end(groups.part()); ++j) {
        double expected = 0;
        for (int pass = 0; pass < passes; ++pass) {
          for (int r = 0; r < ranks; ++r) expected += Gradient(b, i, j, r, pass);
        }
        ASSERT_EQ(parts[b][i].data<double>()[j - cut.begin(groups.part())], expected)
            << b << " " << i << " " << j;
      }
    }
  }
}

TEST(ShardReducerTest, PassesAddUpAndCopiesHaveTheSumOfAllRanks) {
  for (const auto& [ranks, group] : {std::pair{1, 0}, {2, 0}, {3, 0}, {4, 2}, {6, 3}}) {
    for (const int passes : {1, 3}) {
      SCOPED_TRACE(Str(ranks, " ranks in groups of ", group, ", ", passes, " passes"));
      parallel::RunLocal(ranks, [&](Communicator& world) {
        Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
        ShardGroups groups(world, group);
        const auto parts = Parts(ctx, groups.parts());
        ShardReducer reducer(ctx, groups, parts);
        for (int step = 0; step < 2; ++step) {
          for (int pass = 0; pass < passes; ++pass) {
            reducer.BeginPass(pass == 0, pass + 1 == passes);
            for (size_t b = kSizes.size(); b-- > 0;) {
              reducer.BucketReady(static_cast<int>(b),
                                  Whole(ctx, b, groups.parts(), world.rank(), pass));
            }
          }
          reducer.Finish();
          ExpectSums(parts, groups, ranks, passes);
        }
      });
    }
  }
}

// One bucket travels while the next is computed: what is under way is bounded, and starts at once.
TEST(ShardReducerTest, AtMostOneBucketIsUnderWay) {
  parallel::RunLocal(2, [](Communicator& world) {
    Context ctx(ContextOptions{.threads = 1});
    CountingCommunicator counting(world);
    ShardGroups groups(counting, 0);
    ShardReducer reducer(ctx, groups, Parts(ctx, 2));
    const auto started = [&] { return counting.counts()[CommOp::kReduceScatter].calls; };
    reducer.BeginPass(true, true);
    std::vector<Tensor> last = Whole(ctx, 3, 2, world.rank(), 0);
    const Tensor watched = last[0];
    reducer.BucketReady(3, std::move(last));
    EXPECT_EQ(started(), 2) << "must not wait for the next bucket";
    last.clear();
    EXPECT_FALSE(watched.Unique()) << "the transfer needs it";
    reducer.BucketReady(2, Whole(ctx, 2, 2, world.rank(), 0));
    EXPECT_EQ(started(), 3);
    EXPECT_TRUE(watched.Unique()) << "the bucket before must have gone";
    reducer.BucketReady(1, {});
    reducer.BucketReady(0, Whole(ctx, 0, 2, world.rank(), 0));
    reducer.Finish();
    const FlatShard big{1000, 2}, small{3, 2}, a{40, 2}, b{17, 2};
    EXPECT_EQ(counting.counts()[CommOp::kReduceScatter].bytes,
              8 * (big.slot() + small.slot() + a.slot() + b.slot()));
  });
}

TEST(ShardReducerTest, BadUseIsRefused) {
  parallel::SelfCommunicator self;
  Context ctx;
  ShardGroups groups(self, 0);
  ShardReducer reducer(ctx, groups, Parts(ctx, 1));
  reducer.BeginPass(true, true);
  const auto ready = [&](int b) {
    reducer.BucketReady(b, Whole(ctx, static_cast<size_t>(b), 1, 0, 0));
  };
  EXPECT_THROW(ready(2), InvalidArgument) << "out of order";
  EXPECT_THROW(reducer.BucketReady(3, {}), InvalidArgument) << "tensors are missing";
  EXPECT_THROW(reducer.BucketReady(3, Whole(ctx, 2, 1, 0, 0)), InvalidArgument) << "other sizes";
  ready(3);
  EXPECT_THROW(ready(3), InvalidArgument) << "twice";
  ready(2);
  try {
    reducer.Finish();
    ADD_FAILURE() << "bucket 1 was missed silently";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("bucket 1 was never made ready"), std::string::npos);
  }
  EXPECT_THROW(reducer.BeginPass(false, true), InvalidArgument) << "the pass before is incomplete";
  EXPECT_THROW(ShardReducer(ctx, groups, {{Tensor()}}), InvalidArgument);
  EXPECT_THROW(ShardReducer(ctx, groups, {{ctx.Zeros({8}, DType::kBF16)}}), InvalidArgument);
}

TEST(ShardGatherTest, WholesComeAndGo) {
  for (const bool resident : {false, true}) {
    for (const int ranks : {1, 3}) {
      parallel::RunLocal(ranks, [&](Communicator& world) {
        Context ctx(ContextOptions{.threads = 1, .poison_buffers = true});
        ShardGather gather(ctx, world, 16, DType::kBF16, resident);
        EXPECT_EQ(gather.started(), resident);
        for (int step = 0; step < 2; ++step) {
          for (int64_t j = 0; j < 16; ++j) {
            gather.shard().data<BF16>()[j] =
                BF16(static_cast<float>(16 * world.rank() + j + 100 * step));
          }
          gather.Start();
          const Tensor whole = gather.Wait();
          ASSERT_EQ(whole.numel(), 16 * ranks);
          for (int64_t j = 0; j < whole.numel(); ++j) {
            ASSERT_EQ(static_cast<float>(whole.data<BF16>()[j]),
                      static_cast<float>(BF16(static_cast<float>(j + 100 * step))));
          }
          world.Barrier();  // nobody writes its part while others still read
          gather.Drop();
          EXPECT_EQ(gather.started(), resident);
        }
        if (!resident) {
          EXPECT_THROW(gather.Wait(), InvalidArgument);
        }
        gather.Start();  // and is not waited for by anybody but the end
      });
    }
  }
}

}  // namespace
}  // namespace longspan::test
