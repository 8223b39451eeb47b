#include "parallel/comm/nccl_watchdog.h"

#include <glog/logging.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <utility>

namespace longspan::parallel::internal {
namespace {

constexpr int kAbortExitCode = 3;
constexpr auto kPause = std::chrono::milliseconds(50);
constexpr int kPausesPerForeignLook = 20;  // a file on a shared disk: once a second

}  // namespace

Watchdog::Watchdog(std::shared_ptr<DeviceQueue> queue, NcclOptions options, std::string who)
    : queue_(std::move(queue)),
      options_(std::move(options)),
      who_(std::move(who)),
      thread_([this] { Run(); }) {}

Watchdog::~Watchdog() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
  if (aborter_.joinable()) aborter_.join();
}

void Watchdog::Add(std::shared_ptr<Watched> watched) {
  std::lock_guard lock(mutex_);
  watched_.push_back(std::move(watched));
}

void Watchdog::Remove(const Watched& watched) {
  std::lock_guard lock(mutex_);
  std::erase_if(watched_, [&](const auto& w) { return w.get() == &watched; });
}

void Watchdog::Started(std::string description, DeviceEventRef end) {
  std::lock_guard lock(mutex_);
  operations_.push_back({std::move(description), std::move(end), Clock::now()});
}

bool Watchdog::failed() const {
  std::lock_guard lock(mutex_);
  return failure_.has_value();
}

void Watchdog::Check() const {
  std::lock_guard lock(mutex_);
  if (failure_) throw CommError(*failure_);
}

void Watchdog::Fail(const std::string& reason) {
  {
    std::lock_guard lock(mutex_);
    if (!failure_) failure_ = Str(who_, ": ", reason);
  }
  changed_.notify_all();
  Check();
  std::abort();  // not reached: Check has thrown
}

void Watchdog::AwaitAborted() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return aborted_; });
}

// In the order of issue, on one stream: only the oldest can be late.
std::string Watchdog::LateOperation() {
  for (;;) {
    Operation oldest;
    {
      std::lock_guard lock(mutex_);
      if (operations_.empty()) return "";
      oldest = operations_.front();
    }
    if (!queue_->Done(oldest.end)) {
      const std::chrono::duration<double> age = Clock::now() - oldest.start;
      const double timeout_s = timeout_s_;
      if (timeout_s <= 0 || age.count() <= timeout_s) return "";
      return Str(oldest.description, " is not complete after ", timeout_s,
                 " s: another rank is stuck, has ended or has not issued it");
    }
    std::lock_guard lock(mutex_);
    operations_.pop_front();
  }
}

std::string Watchdog::Look() {
  try {
    std::vector<std::shared_ptr<Watched>> watched;
    {
      std::lock_guard lock(mutex_);
      watched = watched_;
    }
    for (const auto& w : watched) {
      if (std::string problem = w->Problem(); !problem.empty()) return problem;
    }
    return LateOperation();
  } catch (const std::exception& e) {  // a device that is lost
    return e.what();
  }
}

void Watchdog::EndAll() {
  std::vector<std::shared_ptr<Watched>> watched;
  {
    std::lock_guard lock(mutex_);
    watched = watched_;
  }
  for (const auto& w : watched) w->Abort();
  {
    std::lock_guard lock(mutex_);
    operations_.clear();
    aborted_ = true;
  }
  changed_.notify_all();
}

void Watchdog::Run() {
  std::unique_lock lock(mutex_);
  for (int round = 0; !stopping_ && !failure_; ++round) {
    changed_.wait_for(lock, kPause, [this] { return stopping_ || failure_.has_value(); });
    if (stopping_ || failure_) break;
    lock.unlock();
    std::string reason = Look();
    if (reason.empty() && options_.foreign_failure && round % kPausesPerForeignLook == 0) {
      if (const auto foreign = options_.foreign_failure())
        reason = Str("another rank has failed: ", *foreign);
    }
    lock.lock();
    if (!reason.empty() && !failure_) failure_ = Str(who_, ": ", reason);
  }
  if (!failure_) return;
  const std::string reason = *failure_;
  // On a thread of its own: aborting may itself be stuck.
  aborter_ = std::thread([this] { EndAll(); });
  lock.unlock();
  LOG(ERROR) << "communication has failed: " << reason;
  if (options_.publish_failure) options_.publish_failure(reason);
  lock.lock();
  const auto over = [this] { return stopping_ && aborted_; };
  if (options_.exit_after_s <= 0) {
    changed_.wait(lock, over);
  } else if (!changed_.wait_for(lock, std::chrono::duration<double>(options_.exit_after_s), over)) {
    LOG(ERROR) << who_ << " ends: it has not stopped by itself";
    google::FlushLogFiles(google::GLOG_INFO);
    std::_Exit(kAbortExitCode);
  }
}

}  // namespace longspan::parallel::internal
