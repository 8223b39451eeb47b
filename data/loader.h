#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "data/packing.h"

namespace longspan::data {

// The rows of one micro-batch of one data-parallel replica, laid one after another.
struct MicroBatch {
  int64_t index = 0;  // n, as given to LoaderOptions::sample_indices
  int64_t rows = 0;
  int64_t row_length = 0;                      // L
  std::vector<int32_t> tokens, labels;         // [rows * L]
  std::vector<int64_t> positions;              // [rows * L]
  std::vector<std::vector<int64_t>> doc_ends;  // of each row, counted from the row's start
  std::shared_ptr<void> attachment;            // what LoaderOptions::attach returned
};

struct LoaderOptions {
  // RowSampler::Get, or another source of equally long rows.
  std::function<Row(int64_t sample)> row;
  int64_t rows = 1;                  // of a micro-batch
  int64_t first_index = 0;           // n of the first micro-batch: where a resumed run goes on
  std::optional<int64_t> end_index;  // one behind the last n; without it there is no end
  // The `rows` sample indices of this replica's n-th micro-batch.
  std::function<std::vector<int64_t>(int64_t n)> sample_indices;
  int64_t depth = 2;  // micro-batches kept ready, at least 1
  // Runs on the loader's thread for each micro-batch before it is handed out: builds what costs
  // time, such as masks. May be empty.
  std::function<std::shared_ptr<void>(const MicroBatch&)> attach;
};

// Prepares micro-batches on a thread of its own, in the order of n, `depth` ahead of the consumer.
// The functions of the options run on that thread only, and none runs any more once the destructor
// has returned; it waits for the one that is running.
//
// Errors   the constructor: InvalidArgument naming the option. What a function throws is rethrown
// by
//          the Next() whose micro-batch it was, and by every later one.
// Threads  Next() may be called by one thread at a time
class Loader {
 public:
  explicit Loader(LoaderOptions options);
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // Waits for the next micro-batch. InvalidArgument behind end_index.
  MicroBatch Next();

 private:
  void Run();
  MicroBatch Build(int64_t n) const;

  const LoaderOptions options_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable room_, ready_;
  std::deque<MicroBatch> queue_;
  std::exception_ptr error_;  // of the micro-batch behind the queue's last; ends the thread
  bool stop_ = false;
  std::jthread thread_;
};

}  // namespace longspan::data
