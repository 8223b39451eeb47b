#include "data/loader.h"

#include <utility>

#include "ops/core/check.h"

namespace longspan::data {

Loader::Loader(LoaderOptions options) : options_(std::move(options)) {
  LONGSPAN_CHECK(options_.row != nullptr && options_.sample_indices != nullptr);
  LONGSPAN_CHECK(options_.rows >= 1) << "rows " << options_.rows;
  LONGSPAN_CHECK(options_.depth >= 1) << "depth " << options_.depth;
  thread_ = std::jthread([this] { Run(); });
}

Loader::~Loader() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  room_.notify_one();
}

MicroBatch Loader::Build(int64_t n) const {
  if (options_.end_index && n >= *options_.end_index) {
    throw InvalidArgument(
        Str("micro-batch ", n, " does not exist: the last one is ", *options_.end_index - 1));
  }
  const std::vector<int64_t> samples = options_.sample_indices(n);
  LONGSPAN_CHECK(static_cast<int64_t>(samples.size()) == options_.rows)
      << "micro-batch " << n << " was given " << samples.size() << " samples for " << options_.rows
      << " rows";
  MicroBatch batch;
  batch.index = n;
  batch.rows = options_.rows;
  for (const int64_t sample : samples) {
    Row row = options_.row(sample);
    const auto length = static_cast<int64_t>(row.tokens.size());
    if (batch.doc_ends.empty()) batch.row_length = length;
    LONGSPAN_CHECK(length == batch.row_length)
        << "sample " << sample << " has " << length << " tokens and not " << batch.row_length;
    batch.tokens.insert(batch.tokens.end(), row.tokens.begin(), row.tokens.end());
    batch.labels.insert(batch.labels.end(), row.labels.begin(), row.labels.end());
    batch.positions.insert(batch.positions.end(), row.positions.begin(), row.positions.end());
    batch.doc_ends.push_back(std::move(row.doc_ends));
  }
  if (options_.attach) batch.attachment = options_.attach(batch);
  return batch;
}

void Loader::Run() {
  for (int64_t n = options_.first_index;; ++n) {
    {
      std::unique_lock lock(mutex_);
      room_.wait(lock,
                 [&] { return stop_ || static_cast<int64_t>(queue_.size()) < options_.depth; });
      if (stop_) return;
    }
    try {
      MicroBatch batch = Build(n);
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(batch));
    } catch (...) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
      ready_.notify_one();
      return;
    }
    ready_.notify_one();
  }
}

MicroBatch Loader::Next() {
  std::unique_lock lock(mutex_);
  ready_.wait(lock, [&] { return !queue_.empty() || error_; });
  if (queue_.empty()) std::rethrow_exception(error_);
  MicroBatch batch = std::move(queue_.front());
  queue_.pop_front();
  lock.unlock();
  room_.notify_one();
  return batch;
}

}  // namespace longspan::data
