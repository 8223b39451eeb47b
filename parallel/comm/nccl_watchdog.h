#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "parallel/comm/device_queue.h"
#include "parallel/comm/nccl.h"

// Finds out that communication has failed, and ends it. Knows nothing of NCCL's types.
namespace longspan::parallel::internal {

// What the watchdog watches and ends: one NCCL communicator.
class Watched {
 public:
  virtual ~Watched() = default;
  virtual std::string Problem() = 0;  // empty while all is well
  virtual void Abort() noexcept = 0;  // may be called twice
};

// One for a communicator and all made from it by Split. The first failure stays.
class Watchdog {
 public:
  Watchdog(std::shared_ptr<DeviceQueue> queue, NcclOptions options, std::string who);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  const NcclOptions& options() const { return options_; }  // timeout_s may have changed since
  double timeout_s() const { return timeout_s_; }
  void SetTimeout(double seconds) { timeout_s_ = seconds; }
  // For NCCL to take an operation: ranks connect for their first ones, to which one may come late.
  double issue_limit_s() const {
    return timeout_s_ <= 0 ? 0 : std::max<double>(timeout_s_, options_.connect_timeout_s);
  }
  void Add(std::shared_ptr<Watched> watched);
  void Remove(const Watched& watched);
  // An operation that must end in time; operations end in the order of these calls.
  void Started(std::string description, DeviceEventRef end);

  bool failed() const;
  void Check() const;  // throws CommError when communication has failed
  // Records a failure, has everything aborted, and throws it.
  [[noreturn]] void Fail(const std::string& reason);
  // After a failure: returns when everything is aborted.
  void AwaitAborted();

 private:
  using Clock = std::chrono::steady_clock;
  struct Operation {
    std::string description;
    DeviceEventRef end;
    Clock::time_point start;
  };

  void Run();
  std::string Look();  // the reason of a failure, empty without one
  std::string LateOperation();
  void EndAll();

  const std::shared_ptr<DeviceQueue> queue_;
  const NcclOptions options_;
  std::atomic<double> timeout_s_{options_.timeout_s};
  const std::string who_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<Watched>> watched_;
  std::deque<Operation> operations_;
  std::optional<std::string> failure_;
  bool aborted_ = false, stopping_ = false;
  std::thread aborter_, thread_;
};

}  // namespace longspan::parallel::internal
