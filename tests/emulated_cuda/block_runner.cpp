#include "tests/emulated_cuda/block_runner.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sstream>

#include "ops/core/error.h"
#include "tests/emulated_cuda/memory.h"
#include "tests/emulated_cuda/static_shared.h"

#ifdef LONGSPAN_ASAN
#include <sanitizer/asan_interface.h>
#endif

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace longspan::emulated {
namespace {

// Kernels keep fragments in local arrays; unoptimised and instrumented frames are larger.
#if defined(LONGSPAN_ASAN) || defined(LONGSPAN_TSAN) || !defined(NDEBUG)
constexpr size_t kStackBytes = size_t{1} << 20;
#else
constexpr size_t kStackBytes = size_t{256} << 10;
#endif
// Stacks whose tops share their low address bits would fight for the same lines of a cache.
constexpr size_t kColours = 64, kColourBytes = 192;

constexpr size_t kMaxShared = 232448, kGuardBytes = 1024;
constexpr int kGuardByte = 0xa5;
#ifdef LONGSPAN_ASAN
constexpr bool kGuards = false;  // poisoned instead
#else
constexpr bool kGuards = true;
#endif
const std::byte* Guard() {
  static const std::vector<std::byte> guard(kGuardBytes, std::byte{kGuardByte});
  return guard.data();
}

thread_local BlockRunner* current_runner = nullptr;

uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A permutation of [0, n) that needs no memory: i -> (i * step + first) mod n.
struct BlockOrder {
  uint64_t n, step = 1, first = 0;
  BlockOrder(uint64_t blocks, uint64_t seed) : n(blocks) {
    const uint64_t kind = Mix(seed) % 4;
    if (kind == 0 || n == 1) return;
    if (kind == 1) {
      step = n - 1;
      first = n - 1;
      return;
    }
    step = Mix(seed + 1) % n;
    while (step == 0 || std::gcd(step, n) != 1) step = (step + 1) % n;
    first = Mix(seed + 2) % n;
  }
  uint64_t operator()(uint64_t i) const {
    __extension__ using Wide = unsigned __int128;
    return static_cast<uint64_t>((static_cast<Wide>(i) * step + first) % n);
  }
};

std::string Hex(uint32_t mask) {
  std::ostringstream text;
  text << "0x" << std::hex << mask;
  return text.str();
}

}  // namespace

BlockRunner::BlockRunner() : copies_(1024) {
  shared_ = static_cast<std::byte*>(std::aligned_alloc(1024, kMaxShared + kGuardBytes));
}

BlockRunner::~BlockRunner() {
#ifdef LONGSPAN_ASAN
  __asan_unpoison_memory_region(shared_, kMaxShared + kGuardBytes);
#endif
  std::free(shared_);
}

BlockRunner& BlockRunner::Current() { return *current_runner; }

std::string BlockRunner::Run(const KernelRun& run) {
  main_.emplace();
  run_ = &run;
  current_runner = this;
  failure_.clear();
  threads_ = static_cast<int>(run.block.x * run.block.y * run.block.z);
  blockDim = run.block;
  gridDim = run.grid;
  for (int t = 0; t < threads_; ++t) {
    const auto i = static_cast<unsigned>(t);
    index_[static_cast<size_t>(t)] = {i % run.block.x, i / run.block.x % run.block.y,
                                      i / (run.block.x * run.block.y)};
  }
  const uint64_t blocks = uint64_t{run.grid.x} * run.grid.y * run.grid.z;
  const BlockOrder order(blocks, run.seed);
  GuardShared(run.shared_bytes);
  PoisonStaticShared();
  for (uint64_t i = 0; i < blocks && failure_.empty(); ++i) {
    const uint64_t b = order(i);
    blockIdx = {static_cast<unsigned>(b % run.grid.x),
                static_cast<unsigned>(b / run.grid.x % run.grid.y),
                static_cast<unsigned>(b / (uint64_t{run.grid.x} * run.grid.y))};
    BeginBlock(run, b);
    Fiber* fiber = FreeFiber();
    fiber->Prepare(&BlockRunner::FiberMain, this);
    current_ = PickNext();
    running_ = fiber;
    Fiber::Switch(*main_, *fiber);
    EndBlock(run);
  }
  GuardShared(kMaxShared);
  current_runner = nullptr;
  run_ = nullptr;
  return failure_;
}

// What follows the first `bytes` may not be touched.
void BlockRunner::GuardShared(size_t bytes) {
#ifdef LONGSPAN_ASAN
  __asan_unpoison_memory_region(shared_, kMaxShared + kGuardBytes);
  __asan_poison_memory_region(shared_ + bytes, kMaxShared + kGuardBytes - bytes);
#endif
  if (kGuards) std::memcpy(shared_ + bytes, Guard(), kGuardBytes);
}

void BlockRunner::BeginBlock(const KernelRun& run, uint64_t number) {
  random_ = Mix(run.seed + 0x9e3779b97f4a7c15u * (number + 1)) | 1;
  DrawOrder();
  live_ = threads_;
  at_barrier_ = yes_ = 0;
  for (int w = 0; w < 32; ++w) {
    const int lanes = std::clamp(threads_ - 32 * w, 0, 32);
    warps_[static_cast<size_t>(w)] = {lanes == 0 ? ~0u : ~(0xffffffffu >> (32 - lanes)), 0};
  }
  for (int t = 0; t < threads_; ++t) {
    Thread& thread = thread_[static_cast<size_t>(t)];
    thread.state = State::kUnstarted;
    thread.fiber = nullptr;
    thread.committed = 0;
  }
  AllReady();
  if (run.shared_bytes > 0) std::memset(shared_, 0xff, run.shared_bytes);
}

void BlockRunner::EndBlock(const KernelRun& run) {
  if (copied_) {
    for (auto& copies : copies_) copies.clear();
    copied_ = false;
  }
  if (!failure_.empty()) {
    for (int t = 0; t < threads_; ++t) {
      Thread& thread = thread_[static_cast<size_t>(t)];
      if (thread.fiber == nullptr) continue;
      thread.fiber->Abandon();
      free_fibers_.push_back(thread.fiber);
    }
    return;
  }
  const std::byte* guard = shared_ + run.shared_bytes;
  if (!kGuards || std::memcmp(guard, Guard(), kGuardBytes) == 0) return;
  size_t i = run.shared_bytes;
  while (shared_[i] == std::byte{kGuardByte}) ++i;
  failure_ = Str("block ", Place(), " wrote to byte ", i, " of its dynamic shared memory of ",
                 run.shared_bytes, " bytes");
}

uint64_t BlockRunner::Random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_ * 0x2545f4914f6cdd1du >> 33;
}

void BlockRunner::DrawOrder() {
  constexpr Order kOrders[] = {Order::kForward, Order::kBackward, Order::kRandom, Order::kRandom};
  order_ = kOrders[Random() % 4];
}

void BlockRunner::AllReady() {
  ready_.fill(0);
  warps_ready_ = 0;
  for (int first = 0; first < threads_; first += 32) {
    const int lanes = std::min(32, threads_ - first);
    ready_[static_cast<size_t>(first >> 5)] = 0xffffffffu >> (32 - lanes);
    warps_ready_ |= 1u << (first >> 5);
  }
  warp_ = -1;
}

// A warp goes on while any of its lanes can, as they mostly wait for each other.
int BlockRunner::PickNext() {
  if (warps_ready_ == 0) return -1;
  const auto pick = [this](uint32_t bits) {
    if (order_ == Order::kForward) return std::countr_zero(bits);
    if (order_ == Order::kBackward) return 31 - std::countl_zero(bits);
    const int turn = static_cast<int>(Random() & 31);
    return (std::countr_zero(std::rotr(bits, turn)) + turn) & 31;
  };
  if (warp_ < 0 || ready_[static_cast<size_t>(warp_)] == 0 ||
      (order_ == Order::kRandom && Random() % 16 == 0)) {
    warp_ = pick(warps_ready_);
  }
  uint32_t& lanes = ready_[static_cast<size_t>(warp_)];
  const int lane = pick(lanes);
  lanes &= ~(1u << lane);
  if (lanes == 0) warps_ready_ &= ~(1u << warp_);
  return warp_ * 32 + lane;
}

Fiber* BlockRunner::FreeFiber() {
  if (free_fibers_.empty()) {
    const size_t colour = fibers_.size() % kColours * kColourBytes;
    fibers_.push_back(std::make_unique<Fiber>(kStackBytes, colour));
    return fibers_.back().get();
  }
  Fiber* fiber = free_fibers_.back();
  free_fibers_.pop_back();
  return fiber;
}

void BlockRunner::FiberMain(void* argument) {
  auto& runner = *static_cast<BlockRunner*>(argument);
  for (;;) {
    Thread& thread = runner.thread_[static_cast<size_t>(runner.current_)];
    thread.state = State::kRunning;
    threadIdx = runner.index_[static_cast<size_t>(runner.current_)];
    (*runner.run_->body)();
    runner.ThreadExited();
    runner.GoOn();
  }
}

void BlockRunner::ThreadExited() {
  Thread& thread = thread_[static_cast<size_t>(current_)];
  thread.state = State::kExited;
  --live_;
  Warp& lanes = warps_[static_cast<size_t>(current_ >> 5)];
  lanes.gone |= 1u << (current_ & 31);
  for (uint32_t rest = lanes.waiting; rest != 0; rest &= rest - 1) {
    const int t = (current_ & ~31) + std::countr_zero(rest);
    const Thread& other = thread_[static_cast<size_t>(t)];
    if ((other.mask & lanes.gone) == 0) continue;
    failure_ = Str("thread ", t, " waits in ", other.what, " for thread ", current_,
                   ", which has returned");
    Stop();
  }
}

// Starts or resumes another thread; the fiber that calls this is needed no longer unless the next
// thread has not started.
void BlockRunner::GoOn() {
  const int next = PickNext();
  Fiber* mine = running_;
  if (next < 0) {
    if (live_ > 0) StopForWaits();
    free_fibers_.push_back(mine);
    Fiber::Leave(*mine, *main_);
  }
  current_ = next;
  Thread& thread = thread_[static_cast<size_t>(next)];
  if (thread.fiber == nullptr) return;
  free_fibers_.push_back(mine);
  running_ = thread.fiber;
  Fiber::Leave(*mine, *running_);
}

void BlockRunner::Suspend() {
  const int self = current_;
  const int next = PickNext();
  if (next < 0) StopForWaits();
  Thread& thread = thread_[static_cast<size_t>(self)];
  if (next != self) {
    Thread& other = thread_[static_cast<size_t>(next)];
    Fiber* mine = running_;
    thread.fiber = mine;
    current_ = next;
    if (other.fiber != nullptr) {
      running_ = other.fiber;
    } else {
      running_ = FreeFiber();
      running_->Prepare(&BlockRunner::FiberMain, this);
    }
    Fiber::Switch(*mine, *running_);
  }
  thread.fiber = nullptr;
  thread.state = State::kRunning;
  current_ = self;
  threadIdx = index_[static_cast<size_t>(self)];
}

void BlockRunner::Collective(const char* what, uint32_t mask,
                             void (*combine)(void* const*, uint32_t), void* operand) {
  const int lane = current_ & 31, warp = current_ & ~31;
  Thread& mine = thread_[static_cast<size_t>(current_)];
  if (!(mask >> lane & 1)) {
    failure_ = Str("thread ", current_, " calls ", what, " with a mask of ", Hex(mask),
                   " that does not name it");
    Stop();
  }
  Warp& lanes = warps_[static_cast<size_t>(warp >> 5)];
  if ((mask & lanes.gone) != 0) {
    const int t = warp + std::countr_zero(mask & lanes.gone);
    failure_ =
        Str("thread ", current_, " calls ", what, " with a mask of ", Hex(mask),
            " that names thread ", t, ", which ", t < threads_ ? "has returned" : "does not exist");
    Stop();
  }
  mine.what = what;
  mine.mask = mask;
  mine.combine = combine;
  mine.operand = operand;
  lanes.waiting |= 1u << lane;
  void* operands[32] = {};
  bool complete = (mask & ~lanes.waiting) == 0;
  for (uint32_t rest = complete ? mask : 0; rest != 0; rest &= rest - 1) {
    const int other = std::countr_zero(rest);
    const Thread& thread = thread_[static_cast<size_t>(warp + other)];
    operands[other] = thread.operand;
    complete &= thread.mask == mask && thread.combine == combine;
  }
  if (!complete) {
    mine.state = State::kInCollective;
    Suspend();
    return;
  }
  combine(operands, mask);
  lanes.waiting &= ~mask;
  for (uint32_t rest = mask & ~(1u << lane); rest != 0; rest &= rest - 1) {
    const int t = warp + std::countr_zero(rest);
    thread_[static_cast<size_t>(t)].state = State::kReady;
  }
  ready_[static_cast<size_t>(warp >> 5)] |= mask & ~(1u << lane);
  if (mask != 1u << lane) warps_ready_ |= 1u << (warp >> 5);
}

int BlockRunner::Barrier(bool predicate) {
  Thread& mine = thread_[static_cast<size_t>(current_)];
  mine.state = State::kAtBarrier;
  yes_ += predicate;
  if (++at_barrier_ == threads_) {
    at_barrier_ = 0;
    barrier_result_ = yes_;
    yes_ = 0;
    for (int t = 0; t < threads_; ++t) thread_[static_cast<size_t>(t)].state = State::kReady;
    AllReady();
    DrawOrder();
  }
  Suspend();
  return barrier_result_;
}

std::string BlockRunner::Place() {
  return Str("(", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z, ")");
}

// What every thread of the block is waiting for, when none can go on.
std::string BlockRunner::Waits() const {
  int exited = 0, barrier = 0;
  std::string lanes;
  int listed = 0;
  for (int t = 0; t < threads_; ++t) {
    const Thread& thread = thread_[static_cast<size_t>(t)];
    exited += thread.state == State::kExited;
    barrier += thread.state == State::kAtBarrier;
    if (thread.state != State::kInCollective || ++listed > 8) continue;
    lanes += Str("; thread ", t, " is in ", thread.what, " with mask ", Hex(thread.mask));
  }
  return Str("no thread can go on in block ", Place(), ": of ", threads_, " threads ", barrier,
             " are at __syncthreads, ", exited, " have returned", lanes);
}

// The stack of the running thread is left as it is, so nothing on it may own memory by now.
void BlockRunner::Stop() {
  thread_[static_cast<size_t>(current_)].fiber = running_;  // for EndBlock
  Fiber::Leave(*running_, *main_);
  std::abort();  // not reached
}

void BlockRunner::StopForWaits() {
  failure_ = Waits();
  Stop();
}

void BlockRunner::Fail(const char* why) {
  failure_ = why;
  Stop();
}

bool BlockRunner::MayBeShared(const void* p, size_t bytes) const {
  const auto* first = static_cast<const std::byte*>(p);
  const std::byte* end = shared_ + run_->shared_bytes;
  if (first >= shared_ && first < shared_ + kMaxShared) return first + bytes <= end;
  return !MustBeDevice(p) && !running_->HasOnStack(p);  // static shared memory is anywhere else
}

void BlockRunner::StartCopy(void* to, const void* from) {
  std::memset(to, 0xff, 16);
  copied_ = true;
  copies_[static_cast<size_t>(current_)].push_back(
      {to, from, thread_[static_cast<size_t>(current_)].committed});
}

void BlockRunner::CommitCopies() { ++thread_[static_cast<size_t>(current_)].committed; }

void BlockRunner::FinishCopies(int newest) {
  std::vector<PendingCopy>& copies = copies_[static_cast<size_t>(current_)];
  const int last = thread_[static_cast<size_t>(current_)].committed - newest;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < last; ++done) {
    const PendingCopy& copy = copies[done];
    if (copy.from != nullptr) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void WarpCollective(const char* what, uint32_t mask, Combine combine, void* operand) {
  BlockRunner::Current().Collective(what, mask, combine, operand);
}
int BlockBarrier(bool predicate) { return BlockRunner::Current().Barrier(predicate); }
int BlockThreads() { return BlockRunner::Current().block_threads(); }
std::byte* DynamicShared() { return BlockRunner::Current().shared(); }
int Lane() { return BlockRunner::Current().lane(); }
void FailKernel(const char* why) { BlockRunner::Current().Fail(why); }

}  // namespace longspan::emulated
