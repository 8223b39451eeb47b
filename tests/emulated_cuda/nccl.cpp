#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tests/emulated_cuda/emulator.h"
#include "tests/emulated_cuda/nccl_control.h"

namespace {

constexpr int kPollsBeforeProgress = 3;

struct Message {
  const void* from;
  void* to;  // of a receive
  size_t bytes;
  bool done = false;
};

// One operation of one communicator, matched by its number.
struct Meeting {
  std::string kind;
  std::vector<const void*> from;
  std::vector<void*> to;
  int came = 0, left = 0;
  bool done = false, broken = false;
};

struct SplitMeeting {
  std::vector<std::pair<int, int>> choices;  // color, key
  int count = 0;
  std::map<int, std::shared_ptr<struct Clique>> parts;
  std::vector<int> part_rank;
};

// The ranks of a communicator.
struct Clique {
  explicit Clique(int n) : size(n) {}
  const int size;
  std::mutex mutex;
  std::condition_variable changed;
  int joined = 0;
  std::map<int64_t, Meeting> meetings;
  std::map<int64_t, SplitMeeting> splits;
  std::map<std::pair<int, int>, std::deque<Message*>> sends, receives;  // (from, to)
};

std::mutex registry_mutex;
std::map<std::string, std::shared_ptr<Clique>>& Registry() {
  static auto& registry = *new std::map<std::string, std::shared_ptr<Clique>>;
  return registry;
}
std::atomic<int> live_comms{0}, aborted_comms{0}, failing_rank{-1}, failure{0};

}  // namespace

struct ncclComm {
  std::shared_ptr<Clique> clique;
  int rank = 0;
  // Guarded by the clique's mutex.
  bool aborted = false, finalizing = false;
  int64_t next_operation = 0, next_split = 0;
  int outstanding = 0;
  int polls = 0;
  std::vector<std::function<void()>> issued;  // to be given to streams
  // A Split under way.
  int64_t splitting = -1;
  ncclComm_t* part = nullptr;
};

namespace {

// Communicators stay until the end: work of an aborted one may still be on a stream.
std::shared_ptr<ncclComm> Own(ncclComm_t comm) {
  static std::mutex mutex;
  static auto& owned = *new std::map<ncclComm_t, std::shared_ptr<ncclComm>>;
  const std::lock_guard lock(mutex);
  auto& entry = owned[comm];
  if (entry == nullptr) entry.reset(comm);
  return entry;
}

ncclComm_t NewComm(std::shared_ptr<Clique> clique, int rank) {
  auto* comm = new ncclComm;
  comm->clique = std::move(clique);
  comm->rank = rank;
  Own(comm);
  ++live_comms;
  return comm;
}

size_t SizeOf(ncclDataType_t type) {
  switch (type) {
    case ncclUint8:
      return 1;
    case ncclInt32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclFloat64:
      return 8;
  }
  return 0;
}

bool OnDevice(const void* p, size_t bytes) {
  const auto at = longspan::emulated::Locate(p, bytes);
  return at.place == longspan::emulated::Place::kDevice && at.whole;
}

template <class T>
void ReduceAs(const std::vector<const void*>& from, size_t offset, void* to, size_t n,
              ncclRedOp_t op) {
  std::vector<T> total(n);
  for (size_t r = 0; r < from.size(); ++r) {
    const T* x = static_cast<const T*>(from[r]) + offset;
    for (size_t i = 0; i < n; ++i) {
      if (r == 0) {
        total[i] = x[i];
      } else {
        total[i] = op == ncclSum   ? total[i] + x[i]
                   : op == ncclMax ? std::max(total[i], x[i])
                                   : std::min(total[i], x[i]);
      }
    }
  }
  std::memcpy(to, total.data(), n * sizeof(T));
}

void Reduce(ncclDataType_t type, const std::vector<const void*>& from, size_t offset, void* to,
            size_t n, ncclRedOp_t op) {
  if (type == ncclFloat32) ReduceAs<float>(from, offset, to, n, op);
  if (type == ncclFloat64) ReduceAs<double>(from, offset, to, n, op);
  if (type == ncclInt32) ReduceAs<int32_t>(from, offset, to, n, op);
  if (type == ncclInt64) ReduceAs<int64_t>(from, offset, to, n, op);
}

// Whether something may be issued now. Holds the clique's lock.
ncclResult_t Ready(ncclComm_t comm) {
  if (comm->aborted || comm->finalizing || !comm->issued.empty() || comm->splitting >= 0 ||
      comm->clique->joined < comm->clique->size) {
    return ncclInvalidUsage;
  }
  return ncclSuccess;
}

// Hands `work` to the stream once the state has been asked for often enough.
ncclResult_t IssueLater(ncclComm_t comm, cudaStream_t stream, std::function<void()> work) {
  ++comm->outstanding;
  comm->polls = 0;
  comm->issued.push_back([comm, stream, work = std::move(work)] {
    longspan::emulated::Enqueue(stream, [comm, work] {
      work();
      const std::lock_guard lock(comm->clique->mutex);
      --comm->outstanding;
    });
  });
  return ncclInProgress;
}

using Finish = std::function<void(const Meeting&)>;

// In a stream: meets the other ranks in operation `number`; the last to come does the work of all.
void Meet(ncclComm_t comm, int64_t number, const std::string& kind, const void* from, void* to,
          const Finish& finish) {
  Clique& clique = *comm->clique;
  std::unique_lock lock(clique.mutex);
  if (comm->aborted) return;
  Meeting& meeting = clique.meetings[number];
  meeting.from.resize(static_cast<size_t>(clique.size));
  meeting.to.resize(static_cast<size_t>(clique.size));
  if (meeting.came > 0 && meeting.kind != kind) {
    meeting.broken = true;
    longspan::emulated::FailDevice("NCCL: ranks issued " + kind + " and " + meeting.kind);
  }
  meeting.kind = kind;
  meeting.from[static_cast<size_t>(comm->rank)] = from;
  meeting.to[static_cast<size_t>(comm->rank)] = to;
  if (++meeting.came == clique.size && !meeting.broken) {
    finish(meeting);
    meeting.done = true;
    clique.changed.notify_all();
  }
  clique.changed.wait(lock, [&] { return meeting.done || comm->aborted; });
  if (!meeting.done) meeting.broken = true;  // this rank's buffers may go away
  if (++meeting.left == clique.size) clique.meetings.erase(number);
}

ncclResult_t Collective(ncclComm_t comm, cudaStream_t stream, std::string kind, const void* from,
                        size_t from_bytes, void* to, size_t to_bytes, Finish finish) {
  if (!OnDevice(from, from_bytes) || !OnDevice(to, to_bytes)) return ncclInvalidArgument;
  const std::lock_guard lock(comm->clique->mutex);
  if (const auto code = Ready(comm); code != ncclSuccess) return code;
  const int64_t number = comm->next_operation++;
  return IssueLater(comm, stream, [=] { Meet(comm, number, kind, from, to, finish); });
}

// A send or receive of a group.
struct Posted {
  ncclComm_t comm;
  cudaStream_t stream;
  bool send;
  int peer;
  std::shared_ptr<Message> message;
};
thread_local int group_depth = 0;
thread_local std::vector<Posted> group;

void Deliver(Clique& clique, std::pair<int, int> pair) {
  auto& sends = clique.sends[pair];
  auto& receives = clique.receives[pair];
  while (!sends.empty() && !receives.empty()) {
    Message *s = sends.front(), *r = receives.front();
    if (s->bytes != r->bytes) {
      longspan::emulated::FailDevice("NCCL: a message of " + std::to_string(s->bytes) +
                                     " bytes is expected to have " + std::to_string(r->bytes));
    } else {
      std::memcpy(r->to, s->from, s->bytes);
    }
    s->done = r->done = true;
    sends.pop_front();
    receives.pop_front();
  }
}

// In a stream: all messages of one group.
void Exchange(ncclComm_t comm, const std::vector<Posted>& messages) {
  Clique& clique = *comm->clique;
  std::unique_lock lock(clique.mutex);
  if (comm->aborted) return;
  const auto pair_of = [comm](const Posted& p) {
    return p.send ? std::pair(comm->rank, p.peer) : std::pair(p.peer, comm->rank);
  };
  for (const Posted& p : messages) {
    (p.send ? clique.sends : clique.receives)[pair_of(p)].push_back(p.message.get());
    Deliver(clique, pair_of(p));
  }
  clique.changed.notify_all();
  const auto done = [&] {
    return std::all_of(messages.begin(), messages.end(),
                       [](const Posted& p) { return p.message->done; });
  };
  clique.changed.wait(lock, [&] { return done() || comm->aborted; });
  for (const Posted& p : messages) {  // of an aborted communicator: nobody may find them any more
    std::erase((p.send ? clique.sends : clique.receives)[pair_of(p)], p.message.get());
  }
}

// Forms the parts once all ranks have chosen. Holds the clique's lock.
void FormParts(Clique& clique, SplitMeeting& split) {
  split.part_rank.assign(static_cast<size_t>(clique.size), 0);
  std::map<int, std::vector<std::pair<int, int>>> members;  // color -> (key, rank)
  for (int r = 0; r < clique.size; ++r) {
    const auto [color, key] = split.choices[static_cast<size_t>(r)];
    if (color != NCCL_SPLIT_NOCOLOR) members[color].emplace_back(key, r);
  }
  for (auto& [color, list] : members) {
    std::sort(list.begin(), list.end());
    auto part = std::make_shared<Clique>(static_cast<int>(list.size()));
    part->joined = part->size;
    split.parts[color] = part;
    for (size_t i = 0; i < list.size(); ++i) {
      split.part_rank[static_cast<size_t>(list[i].second)] = static_cast<int>(i);
    }
  }
}

// The state of a communicator whose Split is under way. Holds the clique's lock.
ncclResult_t AdvanceSplit(ncclComm_t comm) {
  SplitMeeting& split = comm->clique->splits[comm->splitting];
  if (split.count < comm->clique->size) return ncclInProgress;
  const int color = split.choices[static_cast<size_t>(comm->rank)].first;
  ncclComm_t made = nullptr;
  if (color != NCCL_SPLIT_NOCOLOR) {
    made = NewComm(split.parts[color], split.part_rank[static_cast<size_t>(comm->rank)]);
  }
  __atomic_store_n(comm->part, made, __ATOMIC_RELEASE);
  comm->splitting = -1;
  return ncclSuccess;
}

}  // namespace

namespace longspan::emulated {

void FailNcclRank(int rank, int error) {
  failing_rank = rank;
  failure = error;
}
int LiveNcclComms() { return live_comms; }
int AbortedNcclComms() { return aborted_comms; }

}  // namespace longspan::emulated

ncclResult_t ncclGetVersion(int* version) {
  *version = 22809;
  return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<uint64_t> next{1};
  std::memset(id->internal, 0, sizeof id->internal);
  const uint64_t number = next++;
  std::memcpy(id->internal + 5, &number, sizeof number);
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t code) {
  switch (code) {
    case ncclSuccess:
      return "no error";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclInvalidArgument:
      return "invalid argument";
    default:
      return "unhandled error";
  }
}
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  if (config == nullptr || config->blocking != 0 || rank < 0 || rank >= ranks) {
    return ncclInvalidArgument;
  }
  std::shared_ptr<Clique> clique;
  {
    const std::lock_guard lock(registry_mutex);
    auto& entry = Registry()[std::string(id.internal, sizeof id.internal)];
    if (entry == nullptr) entry = std::make_shared<Clique>(ranks);
    clique = entry;
  }
  if (clique->size != ranks) return ncclInvalidArgument;
  *comm = NewComm(clique, rank);
  const std::lock_guard lock(clique->mutex);
  ++clique->joined;
  return ncclInProgress;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* part,
                           ncclConfig_t* config) {
  if (config == nullptr || config->blocking != 0) return ncclInvalidArgument;
  *part = nullptr;
  const std::lock_guard lock(comm->clique->mutex);
  if (const auto code = Ready(comm); code != ncclSuccess) return code;
  if (comm->outstanding > 0) return ncclInvalidUsage;
  Clique& clique = *comm->clique;
  comm->splitting = comm->next_split++;
  comm->part = part;
  comm->polls = 0;
  SplitMeeting& split = clique.splits[comm->splitting];
  split.choices.resize(static_cast<size_t>(clique.size));
  split.choices[static_cast<size_t>(comm->rank)] = {color, key};
  if (++split.count == clique.size) FormParts(clique, split);
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  if (failure != 0 && failing_rank == comm->rank) {
    *state = static_cast<ncclResult_t>(failure.load());
    return ncclSuccess;
  }
  std::vector<std::function<void()>> issue;
  {
    const std::lock_guard lock(comm->clique->mutex);
    *state = ncclSuccess;
    if (comm->clique->joined < comm->clique->size) {
      *state = ncclInProgress;
    } else if (comm->splitting >= 0) {
      *state = ++comm->polls < kPollsBeforeProgress ? ncclInProgress : AdvanceSplit(comm);
    } else if (!comm->issued.empty()) {
      *state = ncclInProgress;
      if (++comm->polls >= kPollsBeforeProgress) {
        issue.swap(comm->issued);
        *state = ncclSuccess;
      }
    } else if (comm->finalizing && comm->outstanding > 0) {
      *state = ncclInProgress;
    }
  }
  for (const auto& f : issue) f();
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  const std::lock_guard lock(comm->clique->mutex);
  if (const auto code = Ready(comm); code != ncclSuccess) return code;
  comm->finalizing = true;
  return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  const std::lock_guard lock(comm->clique->mutex);
  if (!comm->finalizing || comm->outstanding > 0) return ncclInvalidUsage;
  --live_comms;
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  {
    const std::lock_guard lock(comm->clique->mutex);
    comm->aborted = true;
    comm->outstanding -= static_cast<int>(comm->issued.size());
    comm->issued.clear();
  }
  comm->clique->changed.notify_all();
  --live_comms;
  ++aborted_comms;
  return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = comm->clique->size;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = comm->rank;
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * SizeOf(type);
  return Collective(comm, stream, "AllReduce of " + std::to_string(bytes), from, bytes, to, bytes,
                    [=](const Meeting& m) {
                      std::vector<char> total(bytes);
                      Reduce(type, m.from, 0, total.data(), count, op);
                      for (void* target : m.to) std::memcpy(target, total.data(), bytes);
                    });
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * SizeOf(type);
  const auto ranks = static_cast<size_t>(comm->clique->size);
  return Collective(comm, stream, "AllGather of " + std::to_string(bytes), from, bytes, to,
                    ranks * bytes, [=](const Meeting& m) {
                      for (void* target : m.to) {
                        for (size_t r = 0; r < ranks; ++r) {
                          std::memmove(static_cast<char*>(target) + r * bytes, m.from[r], bytes);
                        }
                      }
                    });
}

ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * SizeOf(type);
  const auto ranks = static_cast<size_t>(comm->clique->size);
  return Collective(comm, stream, "ReduceScatter of " + std::to_string(bytes), from, ranks * bytes,
                    to, bytes, [=](const Meeting& m) {
                      for (size_t r = 0; r < ranks; ++r) {
                        Reduce(type, m.from, r * count, m.to[r], count, op);
                      }
                    });
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * SizeOf(type);
  return Collective(comm, stream,
                    "Broadcast of " + std::to_string(bytes) + " from " + std::to_string(root), from,
                    bytes, to, bytes, [=](const Meeting& m) {
                      const void* source = m.from[static_cast<size_t>(root)];
                      for (void* target : m.to) std::memmove(target, source, bytes);
                    });
}

ncclResult_t ncclGroupStart() {
  ++group_depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (group_depth == 0) return ncclInvalidUsage;
  if (--group_depth > 0) return ncclSuccess;
  const std::vector<Posted> messages = std::exchange(group, {});
  if (messages.empty()) return ncclSuccess;
  ncclComm_t comm = messages.front().comm;
  for (const Posted& p : messages) {
    if (p.comm != comm || p.stream != messages.front().stream) return ncclInvalidUsage;
  }
  const std::lock_guard lock(comm->clique->mutex);
  if (const auto code = Ready(comm); code != ncclSuccess) return code;
  return IssueLater(comm, messages.front().stream, [=] { Exchange(comm, messages); });
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * SizeOf(type);
  if (group_depth == 0 || bytes == 0 || peer == comm->rank) return ncclInvalidUsage;
  if (!OnDevice(from, bytes)) return ncclInvalidArgument;
  group.push_back({comm, stream, true, peer, std::make_shared<Message>(from, nullptr, bytes)});
  return ncclSuccess;
}

ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  const size_t bytes = count * SizeOf(type);
  if (group_depth == 0 || bytes == 0 || peer == comm->rank) return ncclInvalidUsage;
  if (!OnDevice(to, bytes)) return ncclInvalidArgument;
  group.push_back({comm, stream, false, peer, std::make_shared<Message>(nullptr, to, bytes)});
  return ncclSuccess;
}
