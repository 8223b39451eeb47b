#pragma once
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "data/encode.h"

namespace longspan::data {

// Worker threads that encode the units of a corpus a few ahead of the consumer, who takes the
// results in order. Destroying it early stops the workers after their current unit.
class EncodePool {
 public:
  EncodePool(const EncodeOptions& options, int64_t unit_bytes, int threads);
  ~EncodePool();
  EncodePool(const EncodePool&) = delete;
  EncodePool& operator=(const EncodePool&) = delete;

  // The next unit, or nothing after the last. Rethrows what went wrong in that unit, so the first
  // error in the order of the input is the one that is reported.
  std::optional<EncodedUnit> Next();

 private:
  struct Slot {
    bool ready = false;
    EncodedUnit unit;
    std::exception_ptr error;
  };

  void Work();

  EncodeOptions options_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable room_, ready_;
  UnitPlanner planner_;
  std::vector<Slot> slots_;  // a ring
  size_t planned_ = 0, taken_ = 0;
  bool exhausted_ = false, stop_ = false;
  std::vector<std::jthread> workers_;
};

}  // namespace longspan::data
