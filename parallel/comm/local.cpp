#include "parallel/comm/local.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <numeric>
#include <thread>

#include "ops/core/parallel_for.h"
#include "parallel/comm/arguments.h"
#include "parallel/comm/local_hub.h"

namespace longspan::parallel {
namespace {

using internal::LocalGroup;
using internal::LocalHub;
using internal::Posted;

class LocalState : public Work::State {
 public:
  LocalState(std::shared_ptr<LocalHub> hub, std::shared_ptr<Posted> post, std::string who)
      : hub_(std::move(hub)), post_(std::move(post)), who_(std::move(who)) {}
  ~LocalState() override {
    if (!finished_) hub_->Drop(*post_, who_);
  }
  bool Done() override { return finished_ = hub_->Done(*post_); }
  void Wait() override {
    hub_->Wait(*post_, who_);
    finished_ = true;
  }
  double CompletedFraction() const override { return hub_->Fraction(*post_); }

 private:
  std::shared_ptr<LocalHub> hub_;
  std::shared_ptr<Posted> post_;
  std::string who_;
  bool finished_ = false;
};

class LocalCommunicator : public Communicator {
 public:
  LocalCommunicator(std::shared_ptr<LocalHub> hub, std::shared_ptr<LocalGroup> group, int rank)
      : hub_(std::move(hub)), group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  std::string name() const override { return "local"; }

  Work AllReduce(Tensor t, ReduceOp op) override {
    internal::CheckAllReduce(t, op, gpu());
    Posted post{.kind = CommOp::kAllReduce};
    post.in = std::move(t);
    post.reduce = op;
    return Issue(std::move(post), internal::OnGpu(post.in));
  }
  Work AllGather(Tensor in, Tensor out) override {
    internal::CheckAllGather(in, out, rank(), size(), gpu());
    Posted post{.kind = CommOp::kAllGather};
    post.in = std::move(in);
    post.out = std::move(out);
    return Issue(std::move(post), internal::OnGpu(post.in));
  }
  Work ReduceScatter(Tensor in, Tensor out) override {
    internal::CheckReduceScatter(in, out, size(), gpu());
    Posted post{.kind = CommOp::kReduceScatter};
    post.in = std::move(in);
    post.out = std::move(out);
    return Issue(std::move(post), internal::OnGpu(post.in));
  }
  Work Broadcast(Tensor t, int root) override {
    internal::CheckBroadcast(t, root, size(), gpu());
    Posted post{.kind = CommOp::kBroadcast};
    post.in = std::move(t);
    post.root = root;
    return Issue(std::move(post), internal::OnGpu(post.in));
  }
  Work Exchange(std::vector<Send> sends, std::vector<Recv> recvs) override {
    const bool on_gpu = internal::CheckExchange(sends, recvs, rank(), size(), gpu());
    Posted post{.kind = CommOp::kExchange};
    post.sends = std::move(sends);
    post.recvs = std::move(recvs);
    return Issue(std::move(post), on_gpu);
  }
  void Barrier() override { Issue(Posted{.kind = CommOp::kBarrier}, /*on_gpu=*/false).Wait(); }
  void UseDevice(std::shared_ptr<cuda::Runtime> runtime) override {
    internal::UseQueue(queue_, std::move(runtime));
  }
  void Progress() override { hub_->Progress(); }
  void SetTimeout(double seconds) override { hub_->SetTimeout(seconds); }

  std::unique_ptr<Communicator> Split(int color, int key) override {
    Posted request{.kind = CommOp::kSplit};
    request.color = color;
    request.key = key;
    const auto post = hub_->Post(*group_, rank_, sequence_++, std::move(request));
    hub_->Wait(*post, Who());
    if (color < 0) return nullptr;
    auto part = std::make_unique<LocalCommunicator>(hub_, post->split_group, post->split_rank);
    part->queue_ = queue_;
    return part;
  }

  [[noreturn]] void Abort(const std::string& reason) override {
    hub_->Fail(Str(Who(), " aborted: ", reason));
    hub_->Quiesce();
    throw CommError(reason);
  }

 private:
  std::string Who() const { return Str("rank ", rank_, " of ", size()); }
  internal::Gpu gpu() const {
    return queue_ == nullptr ? internal::Gpu() : internal::Gpu(queue_->device());
  }
  Work Issue(Posted&& request, bool on_gpu) {
    if (on_gpu) {
      request.queue = queue_;
      request.ready = queue_->AfterCompute();
    }
    auto post = hub_->Post(*group_, rank_, sequence_++, std::move(request));
    return Work(std::make_shared<LocalState>(hub_, std::move(post), Who()));
  }

  std::shared_ptr<LocalHub> hub_;
  std::shared_ptr<LocalGroup> group_;
  int rank_;
  int64_t sequence_ = 0;
  std::shared_ptr<internal::DeviceQueue> queue_;  // of this rank's GPU, shared with its parts
};

}  // namespace

LocalWorld::LocalWorld(int ranks, LocalOptions options) : ranks_(ranks) {
  LONGSPAN_CHECK(ranks >= 1) << "LocalWorld of " << ranks << " ranks";
  hub_ = std::make_shared<LocalHub>(ranks, options.timeout_s);
  std::vector<int> all(static_cast<size_t>(ranks));
  std::iota(all.begin(), all.end(), 0);
  group_ = hub_->MakeGroup(std::move(all));
}

LocalWorld::~LocalWorld() = default;

std::unique_ptr<Communicator> LocalWorld::Rank(int rank) {
  LONGSPAN_CHECK(rank >= 0 && rank < ranks_) << "LocalWorld: rank " << rank << " of " << ranks_;
  return std::make_unique<LocalCommunicator>(hub_, group_, rank);
}

void LocalWorld::Fail(const std::string& reason) { hub_->Fail(reason); }
void LocalWorld::Leave(int rank) { hub_->Leave(rank); }

void RunLocal(int ranks, const std::function<void(Communicator&)>& body, LocalOptions options) {
  LocalWorld world(ranks, options);
  std::mutex mutex;
  std::exception_ptr error;
  bool error_is_consequence = false;
  auto record = [&](bool consequence) {  // called inside a catch block
    std::lock_guard lock(mutex);
    if (error == nullptr || (error_is_consequence && !consequence)) {
      error = std::current_exception();
      error_is_consequence = consequence;
    }
  };
  auto run = [&](int rank) {
    try {
      const auto comm = world.Rank(rank);
      body(*comm);
      world.Leave(rank);
    } catch (const PeerFailed& e) {
      record(/*consequence=*/true);
      world.Fail(e.what());
    } catch (const std::exception& e) {
      record(/*consequence=*/false);
      world.Fail(Str("rank ", rank, " failed: ", e.what()));
    } catch (...) {
      record(/*consequence=*/false);
      world.Fail(Str("rank ", rank, " failed with an unknown exception"));
    }
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(run, rank);
  for (auto& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

int ThreadsPerLocalRank(int ranks) { return std::max(1, AvailableCores() / std::max(1, ranks)); }

}  // namespace longspan::parallel
