#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "parallel/comm/comm_op.h"
#include "parallel/comm/communicator.h"
#include "parallel/comm/device_queue.h"

// Shared state of a LocalWorld: matching of what ranks post, and the queue of pieces to move.
namespace longspan::parallel::internal {

class LocalGroup;

// What one rank posted for one operation. Guarded by the hub's mutex; the buffers it names are read
// and written by pieces outside of it.
struct Posted {
  CommOp kind = CommOp::kBarrier;
  Tensor in{}, out{};  // AllReduce and Broadcast use `in` alone
  ReduceOp reduce = ReduceOp::kSum;
  int root = 0;
  std::vector<Send> sends{};
  std::vector<Recv> recvs{};
  int color = 0, key = 0;

  // Operands in GPU memory: the rank's queue, the point of its compute stream at which they may be
  // used, and after matching, the ends of all device work on them. No pieces then.
  std::shared_ptr<DeviceQueue> queue{};
  DeviceEventRef ready{};
  std::vector<DeviceEventRef> done{};
  bool on_gpu() const { return ready != nullptr; }

  std::string description{};  // "AllReduce #3 of f32[7]"
  int unmatched = 0;          // ranks whose post this one still needs
  int64_t pieces = 0, pieces_done = 0;
  bool lost = false;                          // a failure while it was matched: never complete
  std::shared_ptr<LocalGroup> split_group{};  // result of Split, null for a negative color
  int split_rank = 0;

  bool Needs(int rank, int peer) const;  // whether completion at `rank` depends on `peer`'s post
  // On a GPU: everything is in the order of the streams.
  bool Complete() const { return !lost && unmatched == 0 && pieces_done == pieces; }
  bool DeviceDone() const;
};

// A copy, or a reduction over all sources stored to all targets, small enough for one poll.
struct Piece {
  std::vector<const std::byte*> sources;  // one for a copy
  std::vector<std::byte*> targets;
  int64_t bytes = 0;
  DType dtype = DType::kU8;
  ReduceOp reduce = ReduceOp::kSum;
  std::vector<std::shared_ptr<Posted>> owners;  // operations that wait for this piece

  void Run() const;
};

// One group of ranks: matches the n-th operation of each.
class LocalGroup {
 public:
  explicit LocalGroup(std::vector<int> world_ranks) : world_ranks_(std::move(world_ranks)) {}
  int size() const { return static_cast<int>(world_ranks_.size()); }
  int world_rank(int rank) const { return world_ranks_[static_cast<size_t>(rank)]; }

 private:
  friend class LocalHub;
  struct Record {  // the posts of one sequence number
    std::vector<std::shared_ptr<Posted>> posts;
    int count = 0;
  };
  std::vector<int> world_ranks_;
  std::map<int64_t, Record> records_;  // those that some rank has not posted yet
};

class LocalHub {
 public:
  LocalHub(int ranks, double timeout_s)
      : left_(static_cast<size_t>(ranks)), timeout_s_(timeout_s) {}

  std::shared_ptr<LocalGroup> MakeGroup(std::vector<int> world_ranks);
  // Posts operation `sequence` of `rank` in `group`; throws CommError when it contradicts a peer's.
  std::shared_ptr<Posted> Post(LocalGroup& group, int rank, int64_t sequence, Posted post);
  void Wait(const Posted& post, const std::string& who);
  bool Done(const Posted& post);
  double Fraction(const Posted& post);
  void Progress() noexcept;
  // An operation was dropped, pending or not: its buffers are about to go away.
  void Drop(const Posted& post, const std::string& who) noexcept;

  void SetTimeout(double seconds);  // of waits that begin later
  void Fail(const std::string& reason);
  void Leave(int world_rank);
  void Quiesce();  // returns when no piece is in flight; call after Fail

 private:
  using Lock = std::unique_lock<std::mutex>;

  void FailLocked(const std::string& reason);
  [[noreturn]] void ThrowFailure(Lock& lock);
  void Match(LocalGroup& group, LocalGroup::Record& record, int rank);
  void MatchMessages(LocalGroup::Record& record, int from, int to);
  void AddCopies(const std::byte* from, std::byte* to, int64_t bytes,
                 const std::shared_ptr<Posted>& a, const std::shared_ptr<Posted>& b);
  void CopyOnDevice(const std::byte* from, std::byte* to, int64_t bytes, Posted& a, Posted& b);
  void AddReduction(const LocalGroup::Record& record);
  void ReduceOnDevice(const LocalGroup::Record& record);
  static void OrderDeviceWork(const Posted& post) noexcept;
  std::string PlaceProblem(const LocalGroup::Record& record, int rank) const;
  void FinishSplit(const LocalGroup& group, const LocalGroup::Record& record);
  void CheckLeft(const LocalGroup& group, const LocalGroup::Record& record);
  std::string Missing(const Posted& post) const;
  void Push(Piece piece);
  bool RunOne(Lock& lock);  // runs the oldest piece with the lock released; false when none

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Piece> ready_;
  std::atomic<int64_t> ready_count_{0};  // ready_.size() for a look without the lock
  int in_flight_ = 0;
  std::optional<std::string> failure_;
  std::vector<char> left_;  // by world rank
  std::vector<std::weak_ptr<LocalGroup>> groups_;
  double timeout_s_;
};

}  // namespace longspan::parallel::internal
