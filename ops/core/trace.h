#pragma once
#include <chrono>
#include <map>
#include <mutex>
#include <string>

namespace longspan {

// Adds up wall time by category ("attention", "gemm", "communication wait", ...). Thread-safe; one
// per Context. Nested categories both count.
class Trace {
 public:
  void Add(const char* category, double seconds) {
    std::lock_guard lock(mutex_);
    seconds_[category] += seconds;
  }
  std::map<std::string, double> Totals() const {
    std::lock_guard lock(mutex_);
    return seconds_;
  }
  void Reset() {
    std::lock_guard lock(mutex_);
    seconds_.clear();
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, double> seconds_;
};

// Times its own lifetime into a category.
class TraceScope {
 public:
  TraceScope(Trace& trace, const char* category)
      : trace_(trace), category_(category), start_(std::chrono::steady_clock::now()) {}
  ~TraceScope() {
    const std::chrono::duration<double> d = std::chrono::steady_clock::now() - start_;
    trace_.Add(category_, d.count());
  }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  Trace& trace_;
  const char* category_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace longspan
