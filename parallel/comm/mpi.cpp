#include "parallel/comm/mpi.h"

#include <glog/logging.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <vector>

#include "parallel/comm/arguments.h"
#include "parallel/comm/comm_op.h"
#include "parallel/comm/mpi_engine.h"
#include "parallel/comm/mpi_staging.h"

namespace longspan::parallel::internal {
namespace {

constexpr int kAbortExitCode = 3;
constexpr int kTagBits = 15;  // MPI promises tags up to 32767

MPI_Datatype TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return MPI_FLOAT;
    case DType::kF64:
      return MPI_DOUBLE;
    case DType::kI32:
      return MPI_INT32_T;
    case DType::kI64:
      return MPI_INT64_T;
    default:
      throw InvalidArgument(Str("MPI reduction of ", ToString(dtype)));
  }
}

MPI_Op OpOf(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return MPI_SUM;
    case ReduceOp::kMax:
      return MPI_MAX;
    case ReduceOp::kMin:
      return MPI_MIN;
  }
  return MPI_OP_NULL;
}

class MpiCommunicator : public Communicator {
 public:
  // Owns `comm`. `name`: of MpiInquiry.
  MpiCommunicator(MPI_Comm comm, std::shared_ptr<MpiEngine> engine, uint64_t name)
      : comm_(comm),
        engine_(std::move(engine)),
        name_(name),
        issued_(engine_->inquiry().Register(name)) {
    CheckMpi(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    CheckMpi(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
    CheckMpi(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
    FindWorldRanks();
  }
  ~MpiCommunicator() override {
    int finalized = 0;
    MPI_Finalized(&finalized);
    // With operations under way (an exception unwinds) the process is about to end anyway.
    if (finalized || engine_->outstanding() > 0) {
      engine_->inquiry().Abandon();
    } else {
      MPI_Comm_free(&comm_);
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "mpi"; }

  Work AllReduce(Tensor t, ReduceOp op) override;
  Work AllGather(Tensor in, Tensor out) override;
  Work ReduceScatter(Tensor in, Tensor out) override;
  Work Broadcast(Tensor t, int root) override;
  Work Exchange(std::vector<Send> sends, std::vector<Recv> recvs) override;

  void Barrier() override {
    const auto state = Begin(CommOp::kBarrier, "", {});
    MPI_Request request;
    CheckMpi(MPI_Ibarrier(comm_, &request), "MPI_Ibarrier");
    engine_->Add(state, request);
    engine_->Wait(*state);
  }
  void Progress() override { engine_->Progress(); }
  void SetTimeout(double seconds) override { engine_->SetTimeout(seconds); }
  void UseDevice(std::shared_ptr<cuda::Runtime> runtime) override {
    UseQueue(queue_, std::move(runtime));
  }

  std::unique_ptr<Communicator> Split(int color, int key) override {
    Barrier();  // MPI_Comm_split has no time limit
    const uint64_t name = MpiInquiry::NameOfPart(name_, sequence_, color);
    *issued_ = ++sequence_;
    MPI_Comm child = MPI_COMM_NULL;
    CheckMpi(MPI_Comm_split(comm_, color < 0 ? MPI_UNDEFINED : color, key, &child),
             "MPI_Comm_split");
    if (child == MPI_COMM_NULL) return nullptr;
    auto part = std::make_unique<MpiCommunicator>(child, engine_, name);
    part->queue_ = queue_;
    return part;
  }

  [[noreturn]] void Abort(const std::string& reason) override {
    LOG(ERROR) << "rank " << rank_ << " ends the job: " << reason;
    google::FlushLogFiles(google::GLOG_INFO);
    MPI_Abort(MPI_COMM_WORLD, kAbortExitCode);
    std::_Exit(kAbortExitCode);  // MPI_Abort may return while the launcher ends the job
  }

 private:
  std::shared_ptr<MpiState> Begin(CommOp op, const std::string& what, std::vector<Tensor> tensors) {
    auto state = std::make_shared<MpiState>(
        Str(ToString(op), " (operation ", sequence_, what.empty() ? "" : " of ", what, ") on rank ",
            rank_, " of ", size_, InJob()),
        std::move(tensors));
    state->Identify(name_, sequence_, world_ranks_);
    *issued_ = ++sequence_;
    return state;
  }
  void FindWorldRanks() {
    MPI_Group all, mine;
    CheckMpi(MPI_Comm_group(MPI_COMM_WORLD, &all), "MPI_Comm_group");
    CheckMpi(MPI_Comm_group(comm_, &mine), "MPI_Comm_group");
    std::vector<int> ranks(static_cast<size_t>(size_));
    std::iota(ranks.begin(), ranks.end(), 0);
    std::vector<int> in_job(ranks.size());
    CheckMpi(MPI_Group_translate_ranks(mine, size_, ranks.data(), all, in_job.data()),
             "MPI_Group_translate_ranks");
    world_ranks_ = std::make_shared<const std::vector<int>>(std::move(in_job));
    MPI_Group_free(&mine);
    MPI_Group_free(&all);
    MPI_Comm_size(MPI_COMM_WORLD, &job_size_);
  }
  int InJob(int rank) const { return (*world_ranks_)[static_cast<size_t>(rank)]; }
  std::string InJob() const {  // of a part: which of the job's ranks this one is
    return size_ == job_size_ ? "" : Str(", rank ", InJob(rank_), " of the job");
  }
  Gpu gpu() const { return queue_ == nullptr ? Gpu() : Gpu(queue_->device()); }
  // Before the buffers of an operation are made: whether its operands are in GPU memory.
  void Place(MpiState& state, bool on_gpu) {
    if (!on_gpu) return;
    state.Stage(queue_);
    queue_->WaitFor(queue_->AfterCompute());
  }
  MpiBuffer Buffer(MpiState& state, const void* data, int64_t bytes) {
    void* operand = const_cast<void*>(data);  // sends are only read
    if (state.queue() == nullptr) return MpiBuffer(operand);
    MpiBuffer buffer(*queue_, operand, bytes, engine_->piece_bytes());
    state.KeepTwin(buffer.twin());
    return buffer;
  }
  MpiBuffer Buffer(MpiState& state, const Tensor& t) {
    return Buffer(state, t.raw(), static_cast<int64_t>(t.bytes()));
  }
  Work Finish(std::shared_ptr<MpiState> state) {
    return Work(std::make_shared<MpiWork>(engine_, std::move(state)));
  }
  // Calls body(begin, count) for pieces of [0, n) elements of `element_bytes`.
  template <class F>
  void ForPieces(int64_t n, int64_t element_bytes, F&& body) {
    const int64_t step = std::max<int64_t>(1, engine_->piece_bytes() / element_bytes);
    for (int64_t at = 0; at < n; at += step) body(at, static_cast<int>(std::min(step, n - at)));
  }

  MPI_Comm comm_;
  std::shared_ptr<MpiEngine> engine_;
  std::shared_ptr<DeviceQueue> queue_;  // shared with the parts
  int rank_ = 0, size_ = 1, job_size_ = 1;
  std::shared_ptr<const std::vector<int>> world_ranks_;
  int64_t sequence_ = 0;  // operations issued; the same on every rank
  const uint64_t name_;
  const MpiInquiry::Issued issued_;  // sequence_, for other ranks to ask
};

Work MpiCommunicator::AllReduce(Tensor t, ReduceOp op) {
  CheckAllReduce(t, op, gpu());
  auto state = Begin(CommOp::kAllReduce, t.Describe(), {t});
  Place(*state, OnGpu(t));
  MpiBuffer buffer = Buffer(*state, t);
  buffer.Fetch();
  const int64_t element = static_cast<int64_t>(SizeOf(t.dtype()));
  ForPieces(t.numel(), element, [&](int64_t at, int count) {
    const int64_t begin = at * element, bytes = count * element;
    buffer.Need(begin + bytes);
    MPI_Request request;
    CheckMpi(MPI_Iallreduce(MPI_IN_PLACE, buffer.host() + begin, count, TypeOf(t.dtype()), OpOf(op),
                            comm_, &request),
             "MPI_Iallreduce");
    engine_->Add(state, request, -1, buffer.Return(begin, bytes));
  });
  return Finish(std::move(state));
}

Work MpiCommunicator::AllGather(Tensor in, Tensor out) {
  CheckAllGather(in, out, rank_, size_, gpu());
  auto state = Begin(CommOp::kAllGather, in.Describe(), {in, out});
  Place(*state, OnGpu(in));
  MpiBuffer mine = Buffer(*state, in), all = Buffer(*state, out);
  mine.Fetch();
  const int64_t block = static_cast<int64_t>(in.bytes());
  const bool in_place = mine.host() == all.host() + rank_ * block;
  ForPieces(block, 1, [&](int64_t at, int count) {
    mine.Need(at + count);
    // The pieces of the ranks lie one block apart in `out`.
    MPI_Datatype bytes, strided;
    CheckMpi(MPI_Type_contiguous(count, MPI_BYTE, &bytes), "MPI_Type_contiguous");
    CheckMpi(MPI_Type_create_resized(bytes, 0, block, &strided), "MPI_Type_create_resized");
    CheckMpi(MPI_Type_commit(&strided), "MPI_Type_commit");
    MPI_Request request;
    const int code = MPI_Iallgather(in_place ? MPI_IN_PLACE : mine.host() + at, count, MPI_BYTE,
                                    all.host() + at, 1, strided, comm_, &request);
    MPI_Type_free(&strided);  // lives on until the operation ends
    MPI_Type_free(&bytes);
    CheckMpi(code, "MPI_Iallgather");
    std::function<void()> then;
    if (all.twin() != nullptr) {
      then = [=, p = size_] {
        for (int r = 0; r < p; ++r) all.Return(r * block + at, count)();
      };
    }
    engine_->Add(state, request, -1, std::move(then));
  });
  return Finish(std::move(state));
}

Work MpiCommunicator::ReduceScatter(Tensor in, Tensor out) {
  CheckReduceScatter(in, out, size_, gpu());
  auto state = Begin(CommOp::kReduceScatter, in.Describe(), {in, out});
  Place(*state, OnGpu(in));
  MpiBuffer all = Buffer(*state, in), mine = Buffer(*state, out);
  all.Fetch();
  const int64_t element = static_cast<int64_t>(SizeOf(in.dtype()));
  const int64_t n = out.numel();
  // One reduction to each owner: pieces of different owners are far apart in `in`, which the
  // reduce-scatter calls of MPI cannot express.
  ForPieces(n, element, [&](int64_t at, int count) {
    const int64_t bytes = count * element;
    for (int owner = 0; owner < size_; ++owner) {
      const int64_t begin = (owner * n + at) * element;
      all.Need(begin + bytes);
      MPI_Request request;
      CheckMpi(
          MPI_Ireduce(all.host() + begin, owner == rank_ ? mine.host() + at * element : nullptr,
                      count, TypeOf(in.dtype()), MPI_SUM, owner, comm_, &request),
          "MPI_Ireduce");
      engine_->Add(state, request, -1, owner == rank_ ? mine.Return(at * element, bytes) : nullptr);
    }
  });
  return Finish(std::move(state));
}

Work MpiCommunicator::Broadcast(Tensor t, int root) {
  CheckBroadcast(t, root, size_, gpu());
  auto state = Begin(CommOp::kBroadcast, t.Describe(), {t});
  Place(*state, OnGpu(t));
  MpiBuffer buffer = Buffer(*state, t);
  if (rank_ == root) buffer.Fetch();
  ForPieces(static_cast<int64_t>(t.bytes()), 1, [&](int64_t at, int count) {
    buffer.Need(at + count);
    MPI_Request request;
    CheckMpi(MPI_Ibcast(buffer.host() + at, count, MPI_BYTE, root, comm_, &request), "MPI_Ibcast");
    engine_->Add(state, request, -1, rank_ == root ? nullptr : buffer.Return(at, count));
  });
  return Finish(std::move(state));
}

Work MpiCommunicator::Exchange(std::vector<Send> sends, std::vector<Recv> recvs) {
  const bool on_gpu = CheckExchange(sends, recvs, rank_, size_, gpu());
  // The tag keeps neighbouring exchanges apart even if one of them is mismatched.
  const int tag = static_cast<int>(sequence_ & ((int64_t{1} << kTagBits) - 1));
  std::vector<Tensor> owners;
  for (const Send& s : sends) owners.push_back(s.owner);
  for (const Recv& r : recvs) owners.push_back(r.owner);
  auto state = Begin(CommOp::kExchange, Str(sends.size(), " sends, ", recvs.size(), " receives"),
                     std::move(owners));
  Place(*state, on_gpu);
  // Not through MPI: Open MPI does not report a size mismatch of messages to oneself.
  ExchangeWithSelf(sends, recvs, rank_,
                   on_gpu ? CopyBytes([this](void* to, const void* from, size_t bytes) {
                     queue_->Copy(to, from, bytes);
                   })
                          : CopyBytes(MoveOnHost));
  for (const Recv& r : recvs) {
    const MpiBuffer buffer = Buffer(*state, r.data, r.bytes);
    ForPieces(r.bytes, 1, [&](int64_t at, int count) {
      MPI_Request request;
      CheckMpi(MPI_Irecv(buffer.host() + at, count, MPI_BYTE, r.peer, tag, comm_, &request),
               "MPI_Irecv");
      engine_->Add(state, request, count, buffer.Return(at, count), InJob(r.peer));
    });
  }
  std::vector<MpiBuffer> outgoing;
  for (const Send& s : sends) {
    outgoing.push_back(Buffer(*state, s.data, s.bytes));
    outgoing.back().Fetch();
  }
  for (size_t i = 0; i < sends.size(); ++i) {
    MpiBuffer& buffer = outgoing[i];
    ForPieces(sends[i].bytes, 1, [&](int64_t at, int count) {
      buffer.Need(at + count);
      MPI_Request request;
      CheckMpi(MPI_Isend(buffer.host() + at, count, MPI_BYTE, sends[i].peer, tag, comm_, &request),
               "MPI_Isend");
      engine_->Add(state, request, -1, nullptr, InJob(sends[i].peer));
    });
  }
  return Finish(std::move(state));
}

}  // namespace

std::unique_ptr<Communicator> MakeMpiWorld(const MpiOptions& options) {
  LONGSPAN_CHECK(options.piece_bytes >= 8 && options.piece_bytes <= (int64_t{1} << 30))
      << "MpiOptions: piece_bytes " << options.piece_bytes;
  MPI_Comm world;
  CheckMpi(MPI_Comm_dup(MPI_COMM_WORLD, &world), "MPI_Comm_dup");
  return std::make_unique<MpiCommunicator>(
      world,
      std::make_shared<MpiEngine>(options.piece_bytes, options.timeout_s, options.foreign_failure),
      MpiInquiry::kWorld);
}

}  // namespace longspan::parallel::internal
