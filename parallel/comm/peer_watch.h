#pragma once
#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace longspan::parallel::internal {

// Finds out at once when the process of another rank on this host ends: nothing else may notice,
// and a launcher that does notice ends the survivors without a word of theirs.
//
// Whoever waits for other ranks asks Failure() and reports it. When nobody has asked a moment after
// the event, because this rank computes, the lowest surviving rank of the host logs it. A process
// that is still there kExitAfterS later ends with exit code 3.
//
// Devices   Linux; where the kernel forbids pidfd_open, processes are looked up ten times a second
class PeerWatch {
 public:
  struct Peer {
    int rank = 0;
    pid_t process = 0;
  };
  static constexpr double kExitAfterS = 20;

  // `rank`: this one, not among the peers.
  PeerWatch(int rank, std::vector<Peer> peers, double exit_after_s = kExitAfterS);
  ~PeerWatch();
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;

  // "rank 1 (process 4711 on this host) has ended"; empty while all are there. Any thread.
  std::optional<std::string> Failure();
  // From here on peers may end. Called by all ranks before the first of them does.
  void Stop();

 private:
  struct Descriptor;  // a file descriptor that is closed

  void Run();
  std::optional<Peer> AwaitEnd();  // empty when stopped
  void Report(const Peer& ended);

  const int rank_;
  const std::vector<Peer> peers_;
  const double exit_after_s_;
  std::unique_ptr<Descriptor> stop_event_;
  std::vector<std::unique_ptr<Descriptor>> processes_;  // of peers_; without those it must look up
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string failure_;
  bool told_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace longspan::parallel::internal
