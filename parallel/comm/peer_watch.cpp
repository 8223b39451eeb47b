#include "parallel/comm/peer_watch.h"

#include <glog/logging.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>

#include "ops/core/error.h"

namespace longspan::parallel::internal {
namespace {

constexpr int kAbortExitCode = 3;
// Launchers leave survivors about a second.
constexpr auto kTimeToTell = std::chrono::milliseconds(200);
constexpr int kLookEveryMs = 100;

}  // namespace

struct PeerWatch::Descriptor {
  explicit Descriptor(int fd) : fd(fd) {}
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int fd;  // negative: there is none
};

PeerWatch::PeerWatch(int rank, std::vector<Peer> peers, double exit_after_s)
    : rank_(rank), peers_(std::move(peers)), exit_after_s_(exit_after_s) {
  if (peers_.empty()) return;
  stop_event_ = std::make_unique<Descriptor>(eventfd(0, EFD_CLOEXEC));
  for (const Peer& peer : peers_) {
    processes_.push_back(
        std::make_unique<Descriptor>(static_cast<int>(syscall(SYS_pidfd_open, peer.process, 0))));
  }
  // Signals are for the rank's own thread.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { Run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

PeerWatch::~PeerWatch() { Stop(); }

void PeerWatch::Stop() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(stop_event_->fd, &one, sizeof one);
  thread_.join();
}

std::optional<std::string> PeerWatch::Failure() {
  if (!failed_.load(std::memory_order_acquire)) return std::nullopt;
  std::lock_guard lock(mutex_);
  told_ = true;
  changed_.notify_all();
  return failure_;
}

std::optional<PeerWatch::Peer> PeerWatch::AwaitEnd() {
  std::vector<pollfd> polled = {{stop_event_->fd, POLLIN, 0}};
  bool look_up = stop_event_->fd < 0;
  for (const auto& process : processes_) {
    polled.push_back({process->fd, POLLIN, 0});  // poll skips negative ones
    look_up = look_up || process->fd < 0;
  }
  for (;;) {
    poll(polled.data(), polled.size(), look_up ? kLookEveryMs : -1);
    {
      std::lock_guard lock(mutex_);
      if (stopping_) return std::nullopt;
    }
    for (size_t i = 0; i < peers_.size(); ++i) {
      const bool gone = processes_[i]->fd < 0 ? kill(peers_[i].process, 0) != 0 && errno == ESRCH
                                              : (polled[i + 1].revents & POLLIN) != 0;
      if (gone) return peers_[i];
    }
  }
}

void PeerWatch::Report(const Peer& ended) {
  std::unique_lock lock(mutex_);
  failure_ = Str("rank ", ended.rank, " (process ", ended.process, " on this host) has ended");
  failed_.store(true, std::memory_order_release);
  const bool lowest = std::ranges::all_of(
      peers_, [&](const Peer& p) { return p.rank == ended.rank || p.rank > rank_; });
  changed_.wait_for(lock, kTimeToTell, [this] { return told_ || stopping_; });
  if (!told_ && !stopping_ && lowest) {
    LOG(ERROR) << "rank " << rank_ << ": " << failure_ << ", so this job cannot go on";
    google::FlushLogFiles(google::GLOG_INFO);
  }
}

void PeerWatch::Run() {
  const auto ended = AwaitEnd();
  if (!ended) return;
  Report(*ended);
  std::unique_lock lock(mutex_);
  const auto over = [this] { return stopping_; };
  if (exit_after_s_ <= 0) {
    changed_.wait(lock, over);
  } else if (!changed_.wait_for(lock, std::chrono::duration<double>(exit_after_s_), over)) {
    LOG(ERROR) << "rank " << rank_ << " ends: it has not stopped by itself";
    google::FlushLogFiles(google::GLOG_INFO);
    std::_Exit(kAbortExitCode);
  }
}

}  // namespace longspan::parallel::internal
