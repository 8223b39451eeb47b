#include "parallel/comm/mpi_engine.h"

#include <glog/logging.h>

#include <chrono>
#include <exception>
#include <set>
#include <thread>

namespace longspan::parallel::internal {
namespace {

// Unfinished polls between two looks for questions of ranks that have waited too long.
constexpr uint32_t kPollsPerAnswer = 64;

std::string MpiText(int code) {
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  return std::string(text, static_cast<size_t>(length));
}

// Polls without pause for a short time, for operations that are about to end, then gives the core
// away for longer and longer: ranks may share cores, and the transfer needs the peer to run.
class Backoff {
 public:
  void Pause() {
    using std::chrono::microseconds;
    if (Clock::now() - start_ < microseconds(30)) {
      std::this_thread::yield();
      return;
    }
    std::this_thread::sleep_for(pause_);
    pause_ = std::min(pause_ * 2, microseconds(50));
  }
  void Reset() {
    start_ = Clock::now();
    pause_ = std::chrono::microseconds(2);
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
  std::chrono::microseconds pause_{2};
};

}  // namespace

void CheckMpi(int code, const char* call) {
  if (code != MPI_SUCCESS) throw CommError(Str(call, " failed: ", MpiText(code)));
}

void MpiEngine::Add(const std::shared_ptr<MpiState>& state, MPI_Request request,
                    int64_t expected_bytes, std::function<void()> then, int peer) {
  std::lock_guard lock(mutex_);
  state->pieces_.fetch_add(1);
  requests_.push_back(request);
  owners_.push_back({state, expected_bytes, std::move(then), peer});
  outstanding_.store(static_cast<int64_t>(requests_.size()), std::memory_order_relaxed);
}

void MpiEngine::Complete(size_t index, const MPI_Status& status, bool failed) {
  const Owner& owner = owners_[index];
  MpiState& state = *owner.state;
  if (failed) {
    state.error_ = Str(state.description_, " failed: ", MpiText(status.MPI_ERROR));
  } else if (owner.expected_bytes >= 0) {
    int count = 0;
    MPI_Get_count(&status, MPI_BYTE, &count);
    if (count != owner.expected_bytes) {
      state.error_ = Str(state.description_, ": a piece from rank ", status.MPI_SOURCE, " has ",
                         count, " bytes but ", owner.expected_bytes, " are expected");
    }
  }
  if (owner.then && state.error_.empty()) {
    try {
      owner.then();
    } catch (const Error& e) {
      state.error_ = Str(state.description_, " failed: ", e.what());
    }
  }
  state.finished_.fetch_add(1, std::memory_order_release);
}

bool MpiEngine::Poll() {
  std::lock_guard lock(mutex_);
  if (requests_.empty()) return false;
  const int n = static_cast<int>(requests_.size());
  indices_.resize(requests_.size());
  statuses_.resize(requests_.size());
  int completed = 0;
  const int code = MPI_Testsome(n, requests_.data(), &completed, indices_.data(), statuses_.data());
  if (code != MPI_SUCCESS && code != MPI_ERR_IN_STATUS) {
    throw CommError(Str("MPI_Testsome failed: ", MpiText(code)));
  }
  if (completed == MPI_UNDEFINED || completed == 0) return false;
  for (int i = 0; i < completed; ++i) {
    const MPI_Status& status = statuses_[static_cast<size_t>(i)];
    Complete(static_cast<size_t>(indices_[static_cast<size_t>(i)]), status,
             code == MPI_ERR_IN_STATUS && status.MPI_ERROR != MPI_SUCCESS);
  }
  size_t kept = 0;  // completed requests became null
  for (size_t i = 0; i < requests_.size(); ++i) {
    if (requests_[i] == MPI_REQUEST_NULL) continue;
    requests_[kept] = requests_[i];
    if (kept != i) owners_[kept] = std::move(owners_[i]);
    ++kept;
  }
  requests_.resize(kept);
  owners_.resize(kept);
  outstanding_.store(static_cast<int64_t>(kept), std::memory_order_relaxed);
  return true;
}

void MpiEngine::Progress() noexcept {
  if (outstanding() == 0) return;
  try {
    Poll();
  } catch (const CommError&) {
    // The next Done or Wait meets the same failure and reports it.
  }
}

bool MpiEngine::Done(const MpiState& state) {
  if (!state.complete()) Poll();
  if (!state.complete()) {
    const auto failure = foreign_failure_ ? foreign_failure_() : std::nullopt;
    if (!failure) {
      if (unfinished_polls_.fetch_add(1) % kPollsPerAnswer == 0) inquiry_.Answer();
      return false;
    }
    throw CommError(Str(state.description_, " cannot be completed: ", *failure));
  }
  if (!state.error_.empty()) throw CommError(state.error_);
  return true;
}

void MpiEngine::Wait(const MpiState& state) {
  const auto start = std::chrono::steady_clock::now();
  Backoff backoff;
  while (!Done(state)) {
    backoff.Pause();
    const double timeout_s = timeout_s_;
    if (timeout_s <= 0) continue;
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
    if (waited.count() > timeout_s) {
      throw CommError(
          Str(state.description_, " is not complete after ", timeout_s, " s: ", Missing(state)));
    }
  }
}

// Who keeps an operation from its end; MPI tells it of messages only, of others the ranks do.
std::string MpiEngine::Missing(const MpiState& state) {
  std::set<int> peers;
  {
    std::lock_guard lock(mutex_);
    for (const Owner& owner : owners_) {
      if (owner.state.get() == &state && owner.peer >= 0) peers.insert(owner.peer);
    }
  }
  if (peers.empty()) {
    try {
      return inquiry_.Ask(state.name_, state.sequence_, *state.ranks_);
    } catch (const CommError& e) {
      return Str("nor can the other ranks be asked: ", e.what());
    }
  }
  std::string text = "its messages with rank";
  for (int peer : peers) text += Str(peer == *peers.begin() ? " " : ", ", peer);
  return text + " of the job have not arrived";
}

const DeviceEventRef& MpiState::DeviceEnd() {
  if (device_end_ == nullptr) {
    device_end_ = queue_->Record();
    for (auto& twin : twins_) queue_->Keep(device_end_, std::move(twin));
    twins_.clear();
  }
  return device_end_;
}

void MpiState::OrderCompute() {
  queue_->ComputeWaitsFor(DeviceEnd());
  ordered_ = true;
}

// Nobody may have waited (a Work was dropped, an exception unwinds): the queue must be through with
// the operands and their twins before they go.
MpiState::~MpiState() {
  if (queue_ == nullptr || ordered_) return;
  try {
    queue_->Synchronize(DeviceEnd());
  } catch (const Error& e) {
    LOG(ERROR) << description_ << ": " << e.what();
  }
}

bool MpiWork::Done() {
  if (!engine_->Done(*state_)) return false;
  return state_->queue() == nullptr || state_->queue()->Done(state_->DeviceEnd());
}

void MpiWork::Wait() {
  engine_->Wait(*state_);
  if (state_->queue() != nullptr) state_->OrderCompute();
}

MpiWork::~MpiWork() {
  if (!state_->complete() && std::uncaught_exceptions() == 0) {
    LOG(ERROR) << state_->description() << " was dropped before it was complete";
  }
}

}  // namespace longspan::parallel::internal
