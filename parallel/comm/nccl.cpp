#include "parallel/comm/nccl.h"

#include <glog/logging.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "parallel/comm/arguments.h"
#include "parallel/comm/bootstrap.h"
#include "parallel/comm/comm_op.h"
#include "parallel/comm/device_queue_cuda.h"
#include "parallel/comm/nccl_watchdog.h"

namespace longspan::parallel {
namespace {

using internal::DeviceEventRef;
using internal::DeviceQueue;
using internal::Watchdog;

constexpr int kAbortExitCode = 3;
constexpr double kFinalizeTimeoutS = 10;

std::string TextOf(ncclResult_t code, ncclComm_t comm) {
  const char* detail = ncclGetLastError(comm);
  const bool has_detail = detail != nullptr && *detail != '\0';
  return Str("NCCL: ", ncclGetErrorString(code), has_detail ? Str(" (", detail, ")") : "");
}

ncclDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ncclFloat32;
    case DType::kF64:
      return ncclFloat64;
    case DType::kI32:
      return ncclInt32;
    case DType::kI64:
      return ncclInt64;
    default:
      throw InvalidArgument(Str("NCCL reduction of ", ToString(dtype)));
  }
}

ncclRedOp_t OpOf(ReduceOp op) {
  return op == ReduceOp::kSum ? ncclSum : op == ReduceOp::kMax ? ncclMax : ncclMin;
}

// Polls at first without pause, for what NCCL does at once, then gives the core away.
class Pauses {
 public:
  explicit Pauses(double limit_s) : limit_s_(limit_s) {}
  bool Next() {  // false when the time is over
    if (++rounds_ < 200) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(rounds_ < 1000 ? 20 : 200));
    }
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start_;
    return limit_s_ <= 0 || passed.count() < limit_s_;
  }

 private:
  const double limit_s_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  int64_t rounds_ = 0;
};

// One NCCL communicator. It does not block, so every call is short; the lock keeps one thread from
// aborting it while another is inside a call.
class Link : public internal::Watched {
 public:
  ~Link() override { Abort(); }

  // Gives NCCL the place where it writes a new communicator.
  template <class F>
  ncclResult_t Make(F&& make) {
    std::lock_guard lock(mutex_);
    return make(&comm_);
  }
  // Returns f(communicator), or ncclInvalidUsage once it is gone.
  template <class F>
  ncclResult_t Call(F&& f) {
    std::lock_guard lock(mutex_);
    const ncclComm_t comm = Get();
    return comm == nullptr ? ncclInvalidUsage : f(comm);
  }
  ncclResult_t State() {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t code = Call([&](ncclComm_t c) { return ncclCommGetAsyncError(c, &state); });
    return code == ncclSuccess ? state : code;
  }
  std::string Text(ncclResult_t code) {
    std::lock_guard lock(mutex_);
    return TextOf(code, Get());
  }

  std::string Problem() override {
    std::lock_guard lock(mutex_);
    const ncclComm_t comm = Get();
    if (comm == nullptr) return "";
    ncclResult_t state = ncclSuccess;
    ncclResult_t code = ncclCommGetAsyncError(comm, &state);
    if (code == ncclSuccess) code = state;
    return code == ncclSuccess || code == ncclInProgress ? "" : TextOf(code, comm);
  }
  void Abort() noexcept override {
    std::lock_guard lock(mutex_);
    if (const ncclComm_t comm = Take()) ncclCommAbort(comm);
  }
  void Destroy() noexcept {  // after ncclCommFinalize
    std::lock_guard lock(mutex_);
    if (const ncclComm_t comm = Take()) ncclCommDestroy(comm);
  }

 private:
  // While a communicator comes into being, a thread of NCCL writes its handle.
  ncclComm_t Get() const { return __atomic_load_n(&comm_, __ATOMIC_ACQUIRE); }
  ncclComm_t Take() {
    return __atomic_exchange_n(&comm_, static_cast<ncclComm_t>(nullptr), __ATOMIC_ACQ_REL);
  }

  std::mutex mutex_;
  ncclComm_t comm_ = nullptr;
};

// The way of an operand in host memory through pinned and device memory.
struct Trip {
  std::byte* host;
  size_t bytes;
  std::shared_ptr<std::byte> pinned, device;
  bool back;  // to the host in the end
};

class NcclState : public Work::State {
 public:
  NcclState(std::shared_ptr<DeviceQueue> queue, std::shared_ptr<Watchdog> watchdog,
            std::string description, std::vector<Tensor> tensors, bool on_gpu)
      : queue_(std::move(queue)),
        watchdog_(std::move(watchdog)),
        description_(std::move(description)),
        tensors_(std::move(tensors)),
        on_gpu_(on_gpu) {}

  ~NcclState() override {
    if (finished_ || end_ == nullptr) return;
    try {
      if (!queue_->Done(end_) && std::uncaught_exceptions() == 0 && !watchdog_->failed()) {
        LOG(ERROR) << description_ << " was dropped before it was complete";
      }
      if (on_gpu_) queue_->ComputeWaitsFor(end_);
      for (Trip& trip : trips_) queue_->Keep(end_, std::move(trip.pinned));
    } catch (const Error& e) {
      LOG(ERROR) << description_ << ": " << e.what();
    }
  }

  // Where NCCL reads and writes an operand.
  std::byte* Place(const void* data, int64_t bytes, bool in, bool back) {
    auto* operand = static_cast<std::byte*>(const_cast<void*>(data));
    if (on_gpu_ || bytes == 0) return operand;
    const auto size = static_cast<size_t>(bytes);
    trips_.push_back({operand, size, queue_->Pinned(size), queue_->Scratch(size), back});
    Trip& trip = trips_.back();
    if (in) {
      std::memcpy(trip.pinned.get(), operand, size);
      queue_->Copy(trip.device.get(), trip.pinned.get(), size);
    }
    return trip.device.get();
  }
  std::byte* Place(const Tensor& t, bool in, bool back) {
    return Place(t.raw(), static_cast<int64_t>(t.bytes()), in, back);
  }
  // All of the operation has been issued.
  void Issued() {
    for (Trip& trip : trips_) {
      if (trip.back) queue_->Copy(trip.pinned.get(), trip.device.get(), trip.bytes);
      trip.device.reset();
    }
    end_ = queue_->Record();
    watchdog_->Started(description_, end_);
  }

  bool Done() override {
    if (finished_) {  // for the host: what an abort has ended counts as done on the stream
      watchdog_->Check();
      return true;
    }
    const bool done = queue_->Done(end_);
    watchdog_->Check();  // after the look: what an abort has ended is not done
    if (!done) return false;
    for (const Trip& trip : trips_) {
      if (trip.back) std::memcpy(trip.host, trip.pinned.get(), trip.bytes);
    }
    return finished_ = true;
  }
  void Wait() override {
    if (!on_gpu_) {
      Pauses pauses(0);
      while (!Done()) pauses.Next();
    } else if (!finished_) {
      watchdog_->Check();
      queue_->ComputeWaitsFor(end_);
      finished_ = true;
    }
  }
  double CompletedFraction() const override { return finished_ || queue_->Done(end_) ? 1.0 : 0.0; }
  const std::string& description() const { return description_; }

 private:
  const std::shared_ptr<DeviceQueue> queue_;
  const std::shared_ptr<Watchdog> watchdog_;
  const std::string description_;
  std::vector<Tensor> tensors_;
  const bool on_gpu_;
  std::vector<Trip> trips_;
  DeviceEventRef end_;
  bool finished_ = false;
};

// An operation of the host's communicator, whose wait ends in time and when NCCL has failed: the
// peers may never come to it.
class HostState : public Work::State {
 public:
  HostState(Work work, std::shared_ptr<Watchdog> watchdog, std::string description)
      : work_(std::move(work)),
        watchdog_(std::move(watchdog)),
        description_(std::move(description)) {}
  bool Done() override {
    watchdog_->Check();
    return work_.Done();
  }
  void Wait() override {
    const double limit_s = watchdog_->timeout_s();
    Pauses pauses(limit_s);
    while (!Done()) {
      if (pauses.Next()) continue;
      watchdog_->Fail(Str(description_, " is not complete after ", limit_s,
                          " s: another rank is stuck, has ended or has not issued it"));
    }
    work_.Wait();
  }
  double CompletedFraction() const override { return work_.CompletedFraction(); }

 private:
  Work work_;
  const std::shared_ptr<Watchdog> watchdog_;
  const std::string description_;
};

class NcclCommunicator : public Communicator {
 public:
  // `host` carries tensors in host memory where there is one.
  NcclCommunicator(std::shared_ptr<Link> link, std::shared_ptr<DeviceQueue> queue,
                   std::shared_ptr<Watchdog> watchdog, std::unique_ptr<Communicator> host)
      : link_(std::move(link)),
        queue_(std::move(queue)),
        watchdog_(std::move(watchdog)),
        host_(std::move(host)) {
    Require(link_->Call([this](ncclComm_t c) { return ncclCommUserRank(c, &rank_); }), "rank");
    Require(link_->Call([this](ncclComm_t c) { return ncclCommCount(c, &size_); }), "size");
  }
  ~NcclCommunicator() override { Close(); }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "nccl"; }

  Work AllReduce(Tensor t, ReduceOp op) override;
  Work AllGather(Tensor in, Tensor out) override;
  Work ReduceScatter(Tensor in, Tensor out) override;
  Work Broadcast(Tensor t, int root) override;
  Work Exchange(std::vector<Send> sends, std::vector<Recv> recvs) override;
  void Barrier() override { AllReduceValue(*this, int64_t{0}, ReduceOp::kSum); }
  void UseDevice(std::shared_ptr<cuda::Runtime> runtime) override {
    if (runtime != nullptr) queue_->SetCompute(std::move(runtime));
  }
  void Progress() override {  // NCCL and the watchdog have threads of their own
    if (host_ != nullptr) host_->Progress();
  }
  void SetTimeout(double seconds) override {
    watchdog_->SetTimeout(seconds);
    if (host_ != nullptr) host_->SetTimeout(seconds);
  }
  std::unique_ptr<Communicator> Split(int color, int key) override;

  [[noreturn]] void Abort(const std::string& reason) override {
    LOG(ERROR) << "rank " << rank_ << " ends the job: " << reason;
    if (const auto& publish = watchdog_->options().publish_failure) publish(reason);
    if (host_ != nullptr && host_->name() == "mpi") host_->Abort(reason);
    google::FlushLogFiles(google::GLOG_INFO);
    std::_Exit(kAbortExitCode);
  }

  // Returns when NCCL has taken what `link` was given last; only then is it in stream order.
  // `limit_s` 0: no limit.
  static void Settle(Link& link, Watchdog& watchdog, const std::string& what, double limit_s);
  static void SettleConnecting(Link& link, Watchdog& watchdog, const std::string& what) {
    Settle(link, watchdog, what, watchdog.options().connect_timeout_s);
  }

 private:
  void Close() noexcept;
  void Require(ncclResult_t code, const char* what) {
    if (code == ncclSuccess || code == ncclInProgress) return;
    watchdog_->Check();
    watchdog_->Fail(Str(what, ": ", link_->Text(code)));
  }
  internal::Gpu gpu() const { return queue_->device(); }
  Work OnHost(CommOp op, const Tensor& t, Work work) const {
    return Work(std::make_shared<HostState>(
        std::move(work), watchdog_,
        Str(ToString(op), " of ", t.Describe(), " in host memory of ", size_, " ranks")));
  }
  // Not for Exchange: a rank without messages could not tell which way the others go.
  bool ForHost(const Tensor& t) const {
    watchdog_->Check();
    return host_ != nullptr && !internal::OnGpu(t);
  }
  std::shared_ptr<NcclState> Begin(CommOp op, const std::string& what, std::vector<Tensor> tensors,
                                   bool on_gpu);
  // Issues f(communicator, stream).
  template <class F>
  Work Issue(const std::shared_ptr<NcclState>& state, F&& f);

  const std::shared_ptr<Link> link_;
  const std::shared_ptr<DeviceQueue> queue_;  // shared with the parts
  const std::shared_ptr<Watchdog> watchdog_;  // likewise
  const std::unique_ptr<Communicator> host_;
  int rank_ = 0, size_ = 1;
  int64_t sequence_ = 0;
};

void NcclCommunicator::Settle(Link& link, Watchdog& watchdog, const std::string& what,
                              double limit_s) {
  Pauses pauses(limit_s);
  for (;;) {
    const ncclResult_t state = link.State();
    watchdog.Check();
    if (state == ncclSuccess) return;
    if (state != ncclInProgress) watchdog.Fail(Str(what, ": ", link.Text(state)));
    if (!pauses.Next()) {
      watchdog.Fail(Str(what, ": not all ranks came within ", limit_s, " s"));
    }
  }
}

// Waits for what is under way, unless something has failed or an exception unwinds.
void NcclCommunicator::Close() noexcept {
  bool orderly = std::uncaught_exceptions() == 0 && !watchdog_->failed();
  if (orderly) {
    ncclResult_t state = link_->Call([](ncclComm_t c) { return ncclCommFinalize(c); });
    Pauses pauses(kFinalizeTimeoutS);
    if (state == ncclSuccess || state == ncclInProgress) {
      while ((state = link_->State()) == ncclInProgress && !watchdog_->failed() && pauses.Next()) {
      }
    }
    orderly = state == ncclSuccess;
  }
  watchdog_->Remove(*link_);
  if (orderly) {
    link_->Destroy();
  } else {
    link_->Abort();
  }
}

std::shared_ptr<NcclState> NcclCommunicator::Begin(CommOp op, const std::string& what,
                                                   std::vector<Tensor> tensors, bool on_gpu) {
  watchdog_->Check();
  auto state = std::make_shared<NcclState>(
      queue_, watchdog_,
      Str(ToString(op), " of ", what, " (operation ", sequence_++, " of ", size_, " ranks)"),
      std::move(tensors), on_gpu);
  if (on_gpu) queue_->WaitFor(queue_->AfterCompute());
  return state;
}

template <class F>
Work NcclCommunicator::Issue(const std::shared_ptr<NcclState>& state, F&& f) {
  LONGSPAN_CUDA(cudaSetDevice(queue_->device().index));
  const cudaStream_t stream = internal::StreamOf(*queue_);
  Require(link_->Call([&](ncclComm_t comm) { return f(comm, stream); }),
          state->description().c_str());
  Settle(*link_, *watchdog_, state->description(), watchdog_->issue_limit_s());
  state->Issued();
  return Work(state);
}

Work NcclCommunicator::AllReduce(Tensor t, ReduceOp op) {
  internal::CheckAllReduce(t, op, gpu());
  if (ForHost(t)) return OnHost(CommOp::kAllReduce, t, host_->AllReduce(t, op));
  auto state = Begin(CommOp::kAllReduce, t.Describe(), {t}, internal::OnGpu(t));
  if (t.bytes() == 0) return Work();
  std::byte* data = state->Place(t, true, true);
  return Issue(state, [&](ncclComm_t comm, cudaStream_t stream) {
    return ncclAllReduce(data, data, static_cast<size_t>(t.numel()), TypeOf(t.dtype()), OpOf(op),
                         comm, stream);
  });
}

Work NcclCommunicator::AllGather(Tensor in, Tensor out) {
  internal::CheckAllGather(in, out, rank_, size_, gpu());
  if (ForHost(in)) return OnHost(CommOp::kAllGather, in, host_->AllGather(in, out));
  auto state = Begin(CommOp::kAllGather, in.Describe(), {in, out}, internal::OnGpu(in));
  if (in.bytes() == 0) return Work();
  const std::byte* mine = state->Place(in, true, false);
  std::byte* all = state->Place(out, false, true);
  return Issue(state, [&](ncclComm_t comm, cudaStream_t stream) {
    return ncclAllGather(mine, all, in.bytes(), ncclUint8, comm, stream);
  });
}

Work NcclCommunicator::ReduceScatter(Tensor in, Tensor out) {
  internal::CheckReduceScatter(in, out, size_, gpu());
  if (ForHost(in)) return OnHost(CommOp::kReduceScatter, in, host_->ReduceScatter(in, out));
  auto state = Begin(CommOp::kReduceScatter, in.Describe(), {in, out}, internal::OnGpu(in));
  if (out.bytes() == 0) return Work();
  const std::byte* all = state->Place(in, true, false);
  std::byte* mine = state->Place(out, false, true);
  return Issue(state, [&](ncclComm_t comm, cudaStream_t stream) {
    return ncclReduceScatter(all, mine, static_cast<size_t>(out.numel()), TypeOf(out.dtype()),
                             ncclSum, comm, stream);
  });
}

Work NcclCommunicator::Broadcast(Tensor t, int root) {
  internal::CheckBroadcast(t, root, size_, gpu());
  if (ForHost(t)) return OnHost(CommOp::kBroadcast, t, host_->Broadcast(t, root));
  auto state = Begin(CommOp::kBroadcast, t.Describe(), {t}, internal::OnGpu(t));
  if (t.bytes() == 0) return Work();
  std::byte* data = state->Place(t, rank_ == root, rank_ != root);
  return Issue(state, [&](ncclComm_t comm, cudaStream_t stream) {
    return ncclBroadcast(data, data, t.bytes(), ncclUint8, root, comm, stream);
  });
}

// All messages of one call are one group, so that they move together whatever the order of peers.
// Every rank begins with another peer, lest all send to the same one first.
Work NcclCommunicator::Exchange(std::vector<Send> sends, std::vector<Recv> recvs) {
  const bool on_gpu = internal::CheckExchange(sends, recvs, rank_, size_, gpu());
  std::vector<Tensor> owners;
  for (const Send& s : sends) owners.push_back(s.owner);
  for (const Recv& r : recvs) owners.push_back(r.owner);
  auto state = Begin(CommOp::kExchange, Str(sends.size(), " sends, ", recvs.size(), " receives"),
                     std::move(owners), on_gpu);
  internal::ExchangeWithSelf(
      sends, recvs, rank_,
      on_gpu ? internal::CopyBytes([this](void* to, const void* from, size_t bytes) {
        queue_->Copy(to, from, bytes);
      })
             : internal::CopyBytes(internal::MoveOnHost));
  std::erase_if(sends, [](const Send& s) { return s.bytes == 0; });
  std::erase_if(recvs, [](const Recv& r) { return r.bytes == 0; });
  if (sends.empty() && recvs.empty()) {
    if (!on_gpu) return Work();
    state->Issued();  // copies to oneself
    return Work(state);
  }
  const auto distance = [this](int peer, int sign) {
    return (sign * (peer - rank_) + size_) % size_;
  };
  std::ranges::stable_sort(sends, {}, [&](const Send& s) { return distance(s.peer, +1); });
  std::ranges::stable_sort(recvs, {}, [&](const Recv& r) { return distance(r.peer, -1); });
  std::vector<std::byte*> from, to;
  for (const Send& s : sends) from.push_back(state->Place(s.data, s.bytes, true, false));
  for (const Recv& r : recvs) to.push_back(state->Place(r.data, r.bytes, false, true));
  return Issue(state, [&](ncclComm_t comm, cudaStream_t stream) {
    ncclResult_t first = ncclGroupStart();
    const auto note = [&first](ncclResult_t code) {
      if (first == ncclSuccess || first == ncclInProgress) first = code;
    };
    for (size_t i = 0; i < sends.size(); ++i) {
      note(ncclSend(from[i], static_cast<size_t>(sends[i].bytes), ncclUint8, sends[i].peer, comm,
                    stream));
    }
    for (size_t i = 0; i < recvs.size(); ++i) {
      note(ncclRecv(to[i], static_cast<size_t>(recvs[i].bytes), ncclUint8, recvs[i].peer, comm,
                    stream));
    }
    note(ncclGroupEnd());
    return first;
  });
}

ncclConfig_t NonBlocking() {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return config;
}

std::unique_ptr<Communicator> NcclCommunicator::Split(int color, int key) {
  watchdog_->Check();
  ++sequence_;
  // NCCL wants nothing under way on the parent.
  const DeviceEventRef earlier = queue_->Record();
  Pauses pauses(0);
  while (!queue_->Done(earlier)) {
    watchdog_->Check();
    pauses.Next();
  }
  watchdog_->Check();
  LONGSPAN_CUDA(cudaSetDevice(queue_->device().index));
  auto part = std::make_shared<Link>();
  ncclConfig_t config = NonBlocking();
  watchdog_->Add(part);
  Require(link_->Call([&](ncclComm_t parent) {
    return part->Make([&](ncclComm_t* made) {
      return ncclCommSplit(parent, color < 0 ? NCCL_SPLIT_NOCOLOR : color, key, made, &config);
    });
  }),
          "Split");
  SettleConnecting(*link_, *watchdog_, "Split");
  auto host = host_ == nullptr ? nullptr : host_->Split(color, key);
  if (color < 0) {
    watchdog_->Remove(*part);
    return nullptr;
  }
  SettleConnecting(*part, *watchdog_, "Split");
  return std::make_unique<NcclCommunicator>(std::move(part), queue_, watchdog_, std::move(host));
}

}  // namespace

bool NcclBuiltIn() { return true; }

void RepeatNcclSums() { SetEnvironmentDefault(kNcclSwitchSums, "0"); }

std::string MakeNcclId() {
  ncclUniqueId id;
  const ncclResult_t code = ncclGetUniqueId(&id);
  if (code != ncclSuccess) throw CommError(Str("ncclGetUniqueId: ", TextOf(code, nullptr)));
  return std::string(id.internal, sizeof id.internal);
}

namespace {

std::unique_ptr<Communicator> Connect(const std::string& text, int rank, int size,
                                      std::shared_ptr<cuda::Runtime> runtime,
                                      const NcclOptions& options,
                                      std::unique_ptr<Communicator> host) {
  ncclUniqueId id;
  LONGSPAN_CHECK(text.size() == sizeof id.internal && rank >= 0 && rank < size)
      << "MakeNccl: an id of " << text.size() << " bytes, rank " << rank << " of " << size;
  std::memcpy(id.internal, text.data(), sizeof id.internal);
  if (options.deterministic) RepeatNcclSums();
  runtime->MakeCurrent();
  auto queue = internal::MakeDeviceQueue(std::move(runtime));
  auto watchdog = std::make_shared<Watchdog>(queue, options, Str("rank ", rank, " of ", size));
  auto link = std::make_shared<Link>();
  ncclConfig_t config = NonBlocking();
  watchdog->Add(link);
  const std::string what = Str("NCCL on ", size, size == 1 ? " rank" : " ranks");
  const ncclResult_t code = link->Make(
      [&](ncclComm_t* made) { return ncclCommInitRankConfig(made, size, id, rank, &config); });
  if (code != ncclSuccess && code != ncclInProgress) {
    watchdog->Fail(Str(what, ": ", link->Text(code)));
  }
  NcclCommunicator::SettleConnecting(*link, *watchdog, what);
  return std::make_unique<NcclCommunicator>(std::move(link), std::move(queue), std::move(watchdog),
                                            std::move(host));
}

}  // namespace

std::unique_ptr<Communicator> MakeNccl(const std::string& id, int rank, int size,
                                       std::shared_ptr<cuda::Runtime> runtime,
                                       const NcclOptions& options) {
  return Connect(id, rank, size, std::move(runtime), options, nullptr);
}

std::unique_ptr<Communicator> MakeNccl(Communicator& control,
                                       std::shared_ptr<cuda::Runtime> runtime,
                                       const NcclOptions& options) {
  if (options.deterministic) RepeatNcclSums();
  std::string id, error;
  if (control.rank() == 0) {
    try {
      id = MakeNcclId();
    } catch (const CommError& e) {
      error = e.what();
    }
  }
  error = BroadcastString(control, error, 0);
  if (!error.empty()) throw CommError(error);
  id = BroadcastString(control, id, 0);
  return Connect(id, control.rank(), control.size(), std::move(runtime), options,
                 control.Split(0, control.rank()));
}

}  // namespace longspan::parallel
