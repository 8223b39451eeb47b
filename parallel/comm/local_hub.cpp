#include "parallel/comm/local_hub.h"

#include <algorithm>
#include <cstring>

#include "parallel/comm/local.h"

namespace longspan::parallel::internal {
namespace {

// Pieces small enough that a poll between kernel tasks stays short and that several waiting ranks
// share a large message. The partition of a reduction does not change its bits.
constexpr int64_t kCopyPieceBytes = 1 << 20;
constexpr int64_t kReducePieceBytes = 1 << 18;
constexpr int kPiecesPerPoll = 8;

template <class T>
void Combine(T* accumulator, const std::byte* source, int64_t n, ReduceOp op) {
  const T* x = reinterpret_cast<const T*>(source);
  switch (op) {
    case ReduceOp::kSum:
      for (int64_t i = 0; i < n; ++i) accumulator[i] += x[i];
      break;
    case ReduceOp::kMax:
      for (int64_t i = 0; i < n; ++i) accumulator[i] = std::max(accumulator[i], x[i]);
      break;
    case ReduceOp::kMin:
      for (int64_t i = 0; i < n; ++i) accumulator[i] = std::min(accumulator[i], x[i]);
      break;
  }
}

template <class T>
void ReducePiece(const Piece& piece) {
  const int64_t n = piece.bytes / static_cast<int64_t>(sizeof(T));
  std::vector<T> sum(static_cast<size_t>(n));
  std::memcpy(sum.data(), piece.sources[0], static_cast<size_t>(piece.bytes));
  for (size_t r = 1; r < piece.sources.size(); ++r) {
    Combine(sum.data(), piece.sources[r], n, piece.reduce);
  }
  for (std::byte* target : piece.targets) {
    std::memcpy(target, sum.data(), static_cast<size_t>(piece.bytes));
  }
}

// What every rank must agree on under one sequence number, in words.
std::string Agreement(const Posted& p) {
  switch (p.kind) {
    case CommOp::kAllReduce:
      return Str(ToString(p.kind), " of ", p.in.Describe(), " with reduction ",
                 static_cast<int>(p.reduce));
    case CommOp::kBroadcast:
      return Str(ToString(p.kind), " of ", p.in.Describe(), " from rank ", p.root);
    case CommOp::kAllGather:
    case CommOp::kReduceScatter:
      return Str(ToString(p.kind), " of ", p.in.Describe());
    case CommOp::kExchange:
    case CommOp::kBarrier:
    case CommOp::kSplit:
      return ToString(p.kind);
  }
  return "?";
}

}  // namespace

bool Posted::DeviceDone() const {
  return std::ranges::all_of(done, [this](const auto& event) { return queue->Done(event); });
}

bool Posted::Needs(int rank, int peer) const {
  switch (kind) {
    case CommOp::kBroadcast:
      return rank == root || peer == root;
    case CommOp::kExchange: {
      auto names = [peer](const auto& message) {
        return message.peer == peer && message.bytes > 0;
      };
      return std::ranges::any_of(sends, names) || std::ranges::any_of(recvs, names);
    }
    default:
      return true;
  }
}

void Piece::Run() const {
  if (sources.size() == 1 && targets.size() == 1) {
    // The two sides of a self-send may overlap.
    std::memmove(targets[0], sources[0], static_cast<size_t>(bytes));
    return;
  }
  switch (dtype) {
    case DType::kF32:
      return ReducePiece<float>(*this);
    case DType::kF64:
      return ReducePiece<double>(*this);
    case DType::kI32:
      return ReducePiece<int32_t>(*this);
    case DType::kI64:
      return ReducePiece<int64_t>(*this);
    default:
      break;  // refused by CheckAllReduce
  }
}

std::shared_ptr<LocalGroup> LocalHub::MakeGroup(std::vector<int> world_ranks) {
  auto group = std::make_shared<LocalGroup>(std::move(world_ranks));
  std::erase_if(groups_, [](const auto& g) { return g.expired(); });
  groups_.push_back(group);
  return group;
}

std::shared_ptr<Posted> LocalHub::Post(LocalGroup& group, int rank, int64_t sequence, Posted post) {
  auto mine = std::make_shared<Posted>(std::move(post));
  Lock lock(mutex_);
  if (failure_) ThrowFailure(lock);
  auto& record = group.records_[sequence];
  record.posts.resize(static_cast<size_t>(group.size()));
  mine->description = Str(Agreement(*mine), " (operation ", sequence, ")");
  for (int peer = 0; peer < group.size(); ++peer) {
    mine->unmatched += mine->Needs(rank, peer) ? 1 : 0;
    const auto& other = record.posts[static_cast<size_t>(peer)];
    if (other != nullptr && Agreement(*other) != Agreement(*mine)) {
      FailLocked(Str("rank ", rank, " issued ", Agreement(*mine), " as operation ", sequence,
                     " where rank ", peer, " issued ", Agreement(*other)));
      ThrowFailure(lock);
    }
  }
  record.posts[static_cast<size_t>(rank)] = mine;
  ++record.count;
  if (const std::string problem = PlaceProblem(record, rank); !problem.empty()) {
    FailLocked(problem);
    ThrowFailure(lock);
  }
  try {
    Match(group, record, rank);
  } catch (const Error& e) {  // of the device; peers may have parts of it already
    FailLocked(Str(mine->description, " failed: ", e.what()));
  }
  if (failure_) {
    // Peers that posted before must not take what has been matched for all there is.
    for (const auto& post : record.posts) {
      if (post != nullptr) post->lost = true;
    }
    OrderDeviceWork(*mine);
    ThrowFailure(lock);
  }
  if (record.count == group.size()) {
    group.records_.erase(sequence);
  } else {
    CheckLeft(group, record);
    if (failure_) ThrowFailure(lock);
  }
  changed_.notify_all();
  return mine;
}

// Ranks that meet must mean the same memory; one that moves nothing has none.
std::string LocalHub::PlaceProblem(const LocalGroup::Record& record, int rank) const {
  const Posted& mine = *record.posts[static_cast<size_t>(rank)];
  for (size_t peer = 0; peer < record.posts.size(); ++peer) {
    const auto& other = record.posts[peer];
    if (other == nullptr) continue;
    const int r = static_cast<int>(peer);
    const bool meet = mine.Needs(rank, r) && other->Needs(r, rank);
    if (meet && mine.on_gpu() != other->on_gpu() && mine.kind != CommOp::kBarrier) {
      return Str("rank ", rank, " issued ", mine.description, " on ",
                 mine.on_gpu() ? "its GPU" : "the host", " where rank ", peer, " issued it on ",
                 other->on_gpu() ? "its GPU" : "the host");
    }
    if (mine.on_gpu() && other->on_gpu() && mine.queue->device() != other->queue->device()) {
      return Str("rank ", rank, " uses ", ToString(mine.queue->device()), " and rank ", peer, " ",
                 ToString(other->queue->device()), ": ranks as threads share one GPU");
    }
  }
  return "";
}

void LocalHub::Match(LocalGroup& group, LocalGroup::Record& record, int rank) {
  const auto& mine = record.posts[static_cast<size_t>(rank)];
  const int64_t bytes = static_cast<int64_t>(mine->in.defined() ? mine->in.bytes() : 0);
  auto copy = [&](int from, int to) {  // what `from` has for `to`, both posted
    const auto& a = record.posts[static_cast<size_t>(from)];
    const auto& b = record.posts[static_cast<size_t>(to)];
    if (mine->kind == CommOp::kExchange) {
      MatchMessages(record, from, to);
    } else if (mine->kind == CommOp::kAllGather) {
      AddCopies(a->in.raw(), b->out.raw() + from * bytes, bytes, a, b);
    } else if (mine->kind == CommOp::kBroadcast && from == mine->root) {
      AddCopies(a->in.raw(), b->in.raw(), bytes, a, b);
    }
  };
  for (int peer = 0; peer < group.size(); ++peer) {
    const auto& other = record.posts[static_cast<size_t>(peer)];
    if (other == nullptr) continue;
    copy(rank, peer);
    if (peer != rank) copy(peer, rank);
    if (mine->Needs(rank, peer)) --mine->unmatched;
    if (peer != rank && other->Needs(peer, rank)) --other->unmatched;
  }
  if (record.count < group.size()) return;
  if (mine->kind == CommOp::kAllReduce || mine->kind == CommOp::kReduceScatter) {
    AddReduction(record);
  } else if (mine->kind == CommOp::kSplit) {
    FinishSplit(group, record);
  }
}

void LocalHub::MatchMessages(LocalGroup::Record& record, int from, int to) {
  const auto& a = record.posts[static_cast<size_t>(from)];
  const auto& b = record.posts[static_cast<size_t>(to)];
  std::vector<Send> sends;
  std::vector<Recv> recvs;
  for (const Send& s : a->sends) {
    if (s.peer == to && s.bytes > 0) sends.push_back(s);
  }
  for (const Recv& r : b->recvs) {
    if (r.peer == from && r.bytes > 0) recvs.push_back(r);
  }
  if (sends.size() != recvs.size()) {
    return FailLocked(Str("Exchange: rank ", from, " sends ", sends.size(), " messages to rank ",
                          to, " but it receives ", recvs.size()));
  }
  for (size_t i = 0; i < sends.size(); ++i) {
    if (sends[i].bytes != recvs[i].bytes) {
      return FailLocked(Str("Exchange: message ", i, " from rank ", from, " to rank ", to, " has ",
                            sends[i].bytes, " bytes but ", recvs[i].bytes, " are expected"));
    }
    AddCopies(static_cast<const std::byte*>(sends[i].data), static_cast<std::byte*>(recvs[i].data),
              sends[i].bytes, a, b);
  }
}

void LocalHub::AddCopies(const std::byte* from, std::byte* to, int64_t bytes,
                         const std::shared_ptr<Posted>& a, const std::shared_ptr<Posted>& b) {
  if (from == to || bytes == 0) return;
  if (b->on_gpu()) return CopyOnDevice(from, to, bytes, *a, *b);
  // Overlapping buffers (a self-send) must move as a whole.
  const bool overlap = from < to + bytes && to < from + bytes;
  const int64_t step = overlap ? bytes : kCopyPieceBytes;
  for (int64_t at = 0; at < bytes; at += step) {
    Piece piece;
    piece.sources = {from + at};
    piece.targets = {to + at};
    piece.bytes = std::min(step, bytes - at);
    piece.owners = {a};
    if (b != a) piece.owners.push_back(b);
    Push(std::move(piece));
  }
}

// The receiver's queue pulls, once both compute streams have got to the operation; both ranks wait
// for the end of the copy.
void LocalHub::CopyOnDevice(const std::byte* from, std::byte* to, int64_t bytes, Posted& a,
                            Posted& b) {
  b.queue->WaitFor(a.ready);
  b.queue->WaitFor(b.ready);
  b.queue->Copy(to, from, static_cast<size_t>(bytes));
  const DeviceEventRef end = b.queue->Record();
  a.done.push_back(end);
  if (&a != &b) b.done.push_back(end);
}

void LocalHub::ReduceOnDevice(const LocalGroup::Record& record) {
  const Posted& first = *record.posts[0];
  const bool scatter = first.kind == CommOp::kReduceScatter;
  const Tensor& result = scatter ? first.out : first.in;
  if (result.bytes() == 0) return;
  const size_t blocks = scatter ? record.posts.size() : 1;
  for (size_t block = 0; block < blocks; ++block) {
    DeviceQueue& queue = *record.posts[block]->queue;
    std::vector<const void*> sources;
    std::vector<void*> targets;
    for (const auto& post : record.posts) {
      queue.WaitFor(post->ready);
      sources.push_back(post->in.raw() + block * result.bytes());
      if (!scatter) targets.push_back(post->in.raw());
    }
    if (scatter) targets.push_back(record.posts[block]->out.raw());
    queue.Reduce(sources, targets, result.numel(), result.dtype(), first.reduce);
    const DeviceEventRef end = queue.Record();
    for (const auto& post : record.posts) post->done.push_back(end);
  }
}

void LocalHub::AddReduction(const LocalGroup::Record& record) {
  const Posted& first = *record.posts[0];
  if (first.on_gpu()) return ReduceOnDevice(record);
  const bool scatter = first.kind == CommOp::kReduceScatter;
  const int64_t bytes = static_cast<int64_t>(scatter ? first.out.bytes() : first.in.bytes());
  const size_t blocks = scatter ? record.posts.size() : 1;
  for (size_t block = 0; block < blocks; ++block) {
    for (int64_t at = 0; at < bytes; at += kReducePieceBytes) {
      Piece piece;
      piece.bytes = std::min(kReducePieceBytes, bytes - at);
      piece.dtype = first.in.dtype();
      piece.reduce = first.reduce;
      piece.owners = record.posts;
      for (const auto& post : record.posts) {
        piece.sources.push_back(post->in.raw() + static_cast<int64_t>(block) * bytes + at);
        if (!scatter) piece.targets.push_back(post->in.raw() + at);
      }
      if (scatter) piece.targets.push_back(record.posts[block]->out.raw() + at);
      Push(std::move(piece));
    }
  }
}

void LocalHub::FinishSplit(const LocalGroup& group, const LocalGroup::Record& record) {
  std::map<int, std::vector<std::pair<int, int>>> colors;  // color -> (key, rank)
  for (int r = 0; r < group.size(); ++r) {
    const Posted& post = *record.posts[static_cast<size_t>(r)];
    if (post.color >= 0) colors[post.color].emplace_back(post.key, r);
  }
  for (auto& [color, members] : colors) {
    std::ranges::sort(members);
    std::vector<int> world_ranks;
    for (auto [key, r] : members) world_ranks.push_back(group.world_rank(r));
    const auto child = MakeGroup(std::move(world_ranks));
    for (size_t i = 0; i < members.size(); ++i) {
      Posted& post = *record.posts[static_cast<size_t>(members[i].second)];
      post.split_group = child;
      post.split_rank = static_cast<int>(i);
    }
  }
}

void LocalHub::CheckLeft(const LocalGroup& group, const LocalGroup::Record& record) {
  for (int missing = 0; missing < group.size(); ++missing) {
    if (record.posts[static_cast<size_t>(missing)] != nullptr) continue;
    if (!left_[static_cast<size_t>(group.world_rank(missing))]) continue;
    for (int r = 0; r < group.size(); ++r) {
      const auto& post = record.posts[static_cast<size_t>(r)];
      if (post == nullptr || !post->Needs(r, missing)) continue;
      return FailLocked(Str("rank ", missing, " ended without ", post->description, " that rank ",
                            r, " waits for"));
    }
  }
}

void LocalHub::Push(Piece piece) {
  for (const auto& owner : piece.owners) ++owner->pieces;
  if (failure_) return;  // counted, so that nobody takes the operation for complete, but never run
  ready_.push_back(std::move(piece));
  ready_count_.store(static_cast<int64_t>(ready_.size()), std::memory_order_relaxed);
}

bool LocalHub::RunOne(Lock& lock) {
  if (ready_.empty()) return false;
  const Piece piece = std::move(ready_.front());
  ready_.pop_front();
  ready_count_.store(static_cast<int64_t>(ready_.size()), std::memory_order_relaxed);
  ++in_flight_;
  lock.unlock();
  piece.Run();
  lock.lock();
  --in_flight_;
  bool wake = failure_.has_value();
  for (const auto& owner : piece.owners) {
    ++owner->pieces_done;
    wake = wake || owner->Complete();
  }
  if (wake) changed_.notify_all();
  return true;
}

void LocalHub::Wait(const Posted& post, const std::string& who) {
  Lock lock(mutex_);
  const double timeout_s = timeout_s_;
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::nanoseconds>(
                                             std::chrono::duration<double>(timeout_s));
  while (!post.Complete()) {
    if (failure_) ThrowFailure(lock);
    if (RunOne(lock)) continue;
    if (timeout_s <= 0) {
      changed_.wait(lock);
    } else if (changed_.wait_until(lock, deadline) == std::cv_status::timeout && !failure_ &&
               !post.Complete() && ready_.empty() && in_flight_ == 0) {
      FailLocked(Str(who, " waited ", timeout_s, " s for ", post.description, Missing(post)));
    }
  }
  for (const auto& event : post.done) post.queue->ComputeWaitsFor(event);
}

std::string LocalHub::Missing(const Posted& post) const {
  for (const auto& weak : groups_) {
    const auto group = weak.lock();
    if (group == nullptr) continue;
    for (const auto& [sequence, record] : group->records_) {
      const auto mine =
          std::ranges::find_if(record.posts, [&](const auto& p) { return p.get() == &post; });
      if (mine == record.posts.end()) continue;
      const int rank = static_cast<int>(mine - record.posts.begin());
      std::string text = "; not issued by rank";
      for (int r = 0; r < group->size(); ++r) {
        if (record.posts[static_cast<size_t>(r)] == nullptr && post.Needs(rank, r)) {
          text += Str(" ", r);
        }
      }
      return text;
    }
  }
  return "";
}

bool LocalHub::Done(const Posted& post) {
  Lock lock(mutex_);
  for (int i = 0; i < kPiecesPerPoll && !post.Complete() && !failure_; ++i) {
    if (!RunOne(lock)) break;
  }
  if (!post.Complete() && failure_) ThrowFailure(lock);
  return post.Complete() && post.DeviceDone();
}

double LocalHub::Fraction(const Posted& post) {
  Lock lock(mutex_);
  if (post.Complete() && !post.done.empty()) {
    const auto finished = std::ranges::count_if(
        post.done, [&](const auto& event) { return post.queue->Done(event); });
    return static_cast<double>(finished) / static_cast<double>(post.done.size());
  }
  if (post.Complete()) return 1.0;
  // Peers that have not posted may add pieces; count them as nothing moved yet.
  if (post.pieces == 0 || post.unmatched > 0) return 0.0;
  return static_cast<double>(post.pieces_done) / static_cast<double>(post.pieces);
}

void LocalHub::Progress() noexcept {
  if (ready_count_.load(std::memory_order_relaxed) == 0) return;
  Lock lock(mutex_);
  for (int i = 0; i < kPiecesPerPoll && RunOne(lock); ++i) {
  }
}

// What the device still does to the buffers comes before their next use.
void LocalHub::OrderDeviceWork(const Posted& post) noexcept {
  try {
    for (const auto& event : post.done) post.queue->ComputeWaitsFor(event);
  } catch (const Error&) {
    // The device is lost, which every later call reports.
  }
}

void LocalHub::Drop(const Posted& post, const std::string& who) noexcept {
  Lock lock(mutex_);
  OrderDeviceWork(post);
  if (post.Complete()) return;
  if (!failure_) FailLocked(Str(who, " dropped ", post.description, " before it was complete"));
  changed_.wait(lock, [this] { return in_flight_ == 0; });
}

void LocalHub::SetTimeout(double seconds) {
  Lock lock(mutex_);
  timeout_s_ = seconds;
}

void LocalHub::Fail(const std::string& reason) {
  Lock lock(mutex_);
  FailLocked(reason);
}

void LocalHub::Leave(int world_rank) {
  Lock lock(mutex_);
  left_[static_cast<size_t>(world_rank)] = 1;
  for (const auto& weak : groups_) {
    const auto group = weak.lock();
    if (group == nullptr) continue;
    for (const auto& [sequence, record] : group->records_) CheckLeft(*group, record);
  }
}

void LocalHub::Quiesce() {
  Lock lock(mutex_);
  changed_.wait(lock, [this] { return in_flight_ == 0; });
}

void LocalHub::FailLocked(const std::string& reason) {
  if (!failure_) failure_ = reason;
  ready_.clear();
  ready_count_.store(0, std::memory_order_relaxed);
  changed_.notify_all();
}

// Buffers may go away once the caller unwinds, so pieces that already move must end first.
void LocalHub::ThrowFailure(Lock& lock) {
  changed_.wait(lock, [this] { return in_flight_ == 0; });
  throw PeerFailed(*failure_);
}

}  // namespace longspan::parallel::internal
