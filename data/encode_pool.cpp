#include "data/encode_pool.h"

#include <utility>

namespace longspan::data {

EncodePool::EncodePool(const EncodeOptions& options, int64_t unit_bytes, int threads)
    : options_(options),
      planner_(options.files, unit_bytes),
      slots_(static_cast<size_t>(2 * threads + 2)) {
  for (int t = 0; t < threads; ++t) workers_.emplace_back([this] { Work(); });
}

EncodePool::~EncodePool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  room_.notify_all();
  workers_.clear();  // joins, while the members that they use are alive
}

void EncodePool::Work() {
  UnitEncoder encoder(options_);
  std::unique_lock lock(mutex_);
  while (true) {
    room_.wait(lock, [&] { return stop_ || exhausted_ || planned_ < taken_ + slots_.size(); });
    if (stop_ || exhausted_) return;
    const std::optional<Unit> unit = planner_.Next();
    if (!unit) {
      exhausted_ = true;
      room_.notify_all();
      ready_.notify_all();
      return;
    }
    Slot& slot = slots_[planned_++ % slots_.size()];
    lock.unlock();
    EncodedUnit encoded;
    std::exception_ptr error;
    try {
      encoded = encoder.Encode(*unit);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    slot.unit = std::move(encoded);
    slot.error = error;
    slot.ready = true;
    ready_.notify_all();
  }
}

std::optional<EncodedUnit> EncodePool::Next() {
  std::unique_lock lock(mutex_);
  Slot& slot = slots_[taken_ % slots_.size()];
  ready_.wait(lock, [&] { return slot.ready || (exhausted_ && taken_ == planned_); });
  if (!slot.ready) return std::nullopt;
  ++taken_;
  slot.ready = false;
  EncodedUnit unit = std::move(slot.unit);
  const std::exception_ptr error = std::exchange(slot.error, nullptr);
  room_.notify_one();
  lock.unlock();
  if (error) std::rethrow_exception(error);
  return unit;
}

}  // namespace longspan::data
