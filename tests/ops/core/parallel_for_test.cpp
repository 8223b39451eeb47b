#include "ops/core/parallel_for.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ops/core/context.h"

namespace longspan::test {
namespace {

Context WithThreads(int threads) { return Context({.device = {}, .threads = threads}); }

TEST(ParallelForTest, RunsEachTaskOnceWithAWorkerOfItsOwn) {
  for (const int threads : {1, 2, 3}) {
    for (const int64_t n : {0, 1, 2, 500}) {
      Context ctx = WithThreads(threads);
      std::vector<std::atomic<int>> runs(static_cast<size_t>(n));
      std::vector<std::atomic<int>> busy(static_cast<size_t>(threads));
      ParallelFor(ctx, n, [&](int64_t task, int worker) {
        ASSERT_GE(worker, 0);
        ASSERT_LT(worker, threads);
        EXPECT_EQ(busy[static_cast<size_t>(worker)].fetch_add(1), 0);
        ++runs[static_cast<size_t>(task)];
        --busy[static_cast<size_t>(worker)];
      });
      for (size_t i = 0; i < runs.size(); ++i) EXPECT_EQ(runs[i], 1) << i << " of " << n;
    }
  }
}

TEST(ParallelForTest, RangesCoverEachElementOnceInTheSameCuts) {
  for (const int threads : {1, 3}) {
    Context ctx = WithThreads(threads);
    std::vector<std::atomic<int>> runs(1003);
    ParallelRanges(ctx, 1003, 10, [&](int64_t begin, int64_t end) {
      EXPECT_EQ(begin % 10, 0);
      EXPECT_EQ(end, std::min<int64_t>(begin + 10, 1003));
      for (int64_t i = begin; i < end; ++i) ++runs[static_cast<size_t>(i)];
    });
    for (size_t i = 0; i < runs.size(); ++i) EXPECT_EQ(runs[i], 1) << i;
  }
}

TEST(ParallelForTest, RethrowsTheFirstExceptionAndStops) {
  Context ctx = WithThreads(1);
  std::vector<int64_t> ran;
  try {
    ParallelFor(ctx, 10, [&](int64_t task, int) {
      ran.push_back(task);
      if (task >= 3) throw std::runtime_error("task " + std::to_string(task));
    });
    ADD_FAILURE() << "nothing was thrown";
  } catch (const std::runtime_error& e) {
    EXPECT_STREQ(e.what(), "task 3");
  }
  EXPECT_EQ(ran, (std::vector<int64_t>{0, 1, 2, 3}));
}

// Running all tasks would take seconds; after the error only those under way end.
TEST(ParallelForTest, AnErrorStopsTheOtherThreads) {
  Context ctx = WithThreads(3);
  std::atomic<int64_t> ran = 0;
  const auto task = [&](int64_t i, int) {
    if (i == 0) throw std::runtime_error("task 0");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ++ran;
  };
  try {
    ParallelFor(ctx, 10000, task);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const std::runtime_error& e) {
    EXPECT_STREQ(e.what(), "task 0");
  }
  EXPECT_LT(ran, 9999);
  ran = 0;
  ParallelFor(ctx, 10, [&](int64_t, int) { ++ran; });  // works again
  EXPECT_EQ(ran, 10);
}

TEST(ParallelForTest, CallsProgressOnTheCallingThreadOnly) {
  Context ctx = WithThreads(3);
  const auto caller = std::this_thread::get_id();
  int calls = 0;
  ctx.SetProgress([&] {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    ++calls;
  });
  // The barrier-like first task of each thread makes the caller run at least one.
  std::atomic<int> started = 0;
  ParallelFor(ctx, 3, [&](int64_t, int) {
    ++started;
    while (started < 3) std::this_thread::yield();
  });
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace longspan::test
