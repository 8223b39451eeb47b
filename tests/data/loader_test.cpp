#include "data/loader.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <map>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "data/sampler.h"
#include "ops/core/error.h"
#include "tests/data/data_support.h"

namespace longspan::test {
namespace {

using data::Loader;
using data::LoaderOptions;
using data::MicroBatch;
using data::Row;
using namespace std::chrono_literals;

// A row that shows its sample index: tokens 10 s, 10 s + 1, 10 s + 2.
Row MakeRow(int64_t sample) {
  const auto first = static_cast<int32_t>(10 * sample);
  return {{first, first + 1, first + 2}, {first + 1, -1, first + 3}, {0, 1, 0}, {2, 3}};
}

LoaderOptions Simple() {
  LoaderOptions options;
  options.row = MakeRow;
  options.rows = 2;
  options.sample_indices = [](int64_t n) { return std::vector<int64_t>{2 * n, 2 * n + 1}; };
  return options;
}

TEST(LoaderTest, LaysRowsOneAfterAnother) {
  LoaderOptions options = Simple();
  options.first_index = 3;
  Loader loader(options);
  const MicroBatch batch = loader.Next();
  EXPECT_EQ(batch.index, 3);
  EXPECT_EQ(batch.rows, 2);
  EXPECT_EQ(batch.row_length, 3);
  EXPECT_EQ(batch.tokens, (std::vector<int32_t>{60, 61, 62, 70, 71, 72}));
  EXPECT_EQ(batch.labels, (std::vector<int32_t>{61, -1, 63, 71, -1, 73}));
  EXPECT_EQ(batch.positions, (std::vector<int64_t>{0, 1, 0, 0, 1, 0}));
  EXPECT_EQ(batch.doc_ends, (std::vector<std::vector<int64_t>>{{2, 3}, {2, 3}}));
  EXPECT_EQ(batch.attachment, nullptr);
  for (int64_t n = 4; n < 100; ++n) {
    const MicroBatch next = loader.Next();
    ASSERT_EQ(next.index, n);
    ASSERT_EQ(next.tokens.front(), 20 * n);
  }
}

TEST(LoaderTest, AttachmentsAreBuiltAheadOnTheLoadersThread) {
  LoaderOptions options = Simple();
  std::atomic<int64_t> built = 0;
  std::atomic<bool> on_caller = false;
  const auto caller = std::this_thread::get_id();
  options.depth = 3;
  options.attach = [&](const MicroBatch& batch) {
    if (std::this_thread::get_id() == caller) on_caller = true;
    ++built;
    return std::make_shared<int64_t>(batch.tokens.back());
  };
  Loader loader(options);
  for (int64_t n = 0; n < 5; ++n) {
    for (int wait = 0; wait < 2000 && built < n + 3; ++wait) std::this_thread::sleep_for(1ms);
    std::this_thread::sleep_for(5ms);  // time in which a loader without a limit would run on
    EXPECT_EQ(built, n + 3) << "depth micro-batches are ready, no more";
    const MicroBatch batch = loader.Next();
    EXPECT_EQ(*std::static_pointer_cast<int64_t>(batch.attachment), 10 * (2 * n + 1) + 2);
  }
  EXPECT_FALSE(on_caller);
}

TEST(LoaderTest, ErrorsComeInTheirTurnAndStay) {
  for (const char* place : {"row", "indices", "attach"}) {
    LoaderOptions options = Simple();
    const std::string where = place;
    options.row = [&](int64_t s) {
      if (where == "row" && s == 7) throw DataError("damaged");
      return MakeRow(s);
    };
    options.sample_indices = [&](int64_t n) {
      if (where == "indices" && n == 3) throw DataError("damaged");
      return std::vector<int64_t>{2 * n, 2 * n + 1};
    };
    options.attach = [&](const MicroBatch& batch) -> std::shared_ptr<void> {
      if (where == "attach" && batch.index == 3) throw DataError("damaged");
      return nullptr;
    };
    Loader loader(options);
    for (int64_t n = 0; n < 3; ++n) EXPECT_EQ(loader.Next().index, n);
    for (int again = 0; again < 3; ++again) {
      EXPECT_EQ(MessageOf<DataError>([&] { loader.Next(); }), "damaged") << place;
    }
  }
}

TEST(LoaderTest, EndsBehindTheLastMicroBatch) {
  LoaderOptions options = Simple();
  int64_t highest = -1;
  options.sample_indices = [&](int64_t n) {
    highest = n;
    return std::vector<int64_t>{0, 1};
  };
  options.end_index = 2;
  {
    Loader loader(options);
    loader.Next();
    loader.Next();
    ExpectContains(MessageOf<InvalidArgument>([&] { loader.Next(); }), "micro-batch 2");
  }
  EXPECT_EQ(highest, 1);
}

TEST(LoaderTest, StopsAtAnyTime) {
  for (int taken = 0; taken < 4; ++taken) {
    for (const auto pause : {0ms, 2ms}) {
      LoaderOptions options = Simple();
      std::atomic<bool> gone = false, late = false;
      options.attach = [&](const MicroBatch&) -> std::shared_ptr<void> {
        if (gone) late = true;
        std::this_thread::sleep_for(1ms);
        return nullptr;
      };
      {
        Loader loader(options);
        for (int n = 0; n < taken; ++n) loader.Next();
        std::this_thread::sleep_for(pause);
      }
      gone = true;
      std::this_thread::sleep_for(2ms);
      EXPECT_FALSE(late) << "a function of the options ran after the loader was gone";
    }
  }
}

TEST(LoaderTest, RefusesWrongOptions) {
  const auto with = [](auto change) {
    LoaderOptions options = Simple();
    change(options);
    return options;
  };
  EXPECT_THROW(Loader(with([](auto& o) { o.row = nullptr; })), InvalidArgument);
  EXPECT_THROW(Loader(with([](auto& o) { o.sample_indices = nullptr; })), InvalidArgument);
  EXPECT_THROW(Loader(with([](auto& o) { o.rows = 0; })), InvalidArgument);
  EXPECT_THROW(Loader(with([](auto& o) { o.depth = 0; })), InvalidArgument);
  Loader short_of_samples(with([](auto& o) { o.rows = 3; }));
  ExpectContains(MessageOf<InvalidArgument>([&] { short_of_samples.Next(); }), "2 samples for 3");
  Loader uneven(with([](auto& o) {
    o.row = [](int64_t s) {
      Row row = MakeRow(s);
      if (s == 1) row.tokens.pop_back();
      return row;
    };
  }));
  ExpectContains(MessageOf<InvalidArgument>([&] { uneven.Next(); }), "sample 1 has 2 tokens");
}

// A run of `dp` replicas over real data: which rows make up each global step.
class ReplicaTest : public testing::Test {
 protected:
  static constexpr int64_t kStepRows = 8, kSteps = 20, kLength = 6;

  ReplicaTest() {
    Documents documents;
    int32_t next = 0;
    for (int d = 0; d < 40; ++d) {
      documents.emplace_back(static_cast<size_t>(3 + d % 7));
      std::iota(documents.back().begin(), documents.back().end(), next);
      next += static_cast<int32_t>(documents.back().size());
    }
    WriteDataset(temp_ / "set", documents);
  }

  // The rows (their tokens) that one replica reads, step by step, from `first_step` on.
  std::vector<std::multiset<std::vector<int32_t>>> Steps(int64_t dp, int64_t replica, int64_t rows,
                                                         int64_t first_step) const {
    data::RowSamplerOptions sampling;
    sampling.sources = {{temp_ / "set", 1}};
    sampling.context_length = kLength;
    const RowSampler sampler(sampling);
    const int64_t micro_batches = kStepRows / (dp * rows);  // of a step, on one replica
    LoaderOptions options;
    options.row = [&](int64_t s) { return sampler.Get(s); };
    options.rows = rows;
    options.first_index = first_step * micro_batches;
    options.sample_indices = [=](int64_t n) {
      const int64_t step = n / micro_batches, part = n % micro_batches;
      std::vector<int64_t> samples(static_cast<size_t>(rows));
      std::iota(samples.begin(), samples.end(), step * kStepRows + (part * dp + replica) * rows);
      return samples;
    };
    Loader loader(options);
    std::vector<std::multiset<std::vector<int32_t>>> steps;
    for (int64_t step = first_step; step < kSteps; ++step) {
      auto& rows_of_step = steps.emplace_back();
      for (int64_t m = 0; m < micro_batches; ++m) {
        const MicroBatch batch = loader.Next();
        for (int64_t r = 0; r < rows; ++r) {
          rows_of_step.emplace(batch.tokens.begin() + r * kLength,
                               batch.tokens.begin() + (r + 1) * kLength);
        }
      }
    }
    return steps;
  }
  using RowSampler = data::RowSampler;
  const TempFolder temp_;
};

TEST_F(ReplicaTest, GlobalStepsDoNotDependOnTheNumberOfReplicas) {
  const auto expected = Steps(1, 0, 1, 0);
  for (const int64_t dp : {1, 2, 4}) {
    for (const int64_t rows : {1, 2}) {
      std::vector<std::multiset<std::vector<int32_t>>> together(kSteps);
      for (int64_t replica = 0; replica < dp; ++replica) {
        auto own = Steps(dp, replica, rows, 0);
        for (size_t s = 0; s < own.size(); ++s) together[s].merge(own[s]);
      }
      EXPECT_EQ(together, expected) << dp << " x " << rows;
    }
  }
}

TEST_F(ReplicaTest, ResumingGoesOnWhereTheRunStopped) {
  const auto whole = Steps(2, 1, 2, 0);
  for (const int64_t first : {1, 7, 13}) {  // across epochs: one has 39 rows
    const auto rest = Steps(2, 1, 2, first);
    EXPECT_TRUE(std::equal(rest.begin(), rest.end(), whole.begin() + first, whole.end()));
  }
}

}  // namespace
}  // namespace longspan::test
