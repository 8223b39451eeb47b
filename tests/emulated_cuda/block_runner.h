#pragma once
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tests/emulated_cuda/fiber.h"

namespace longspan::emulated {

// One kernel launch, as a stream runs it.
struct KernelRun {
  const char* name = "";
  dim3 grid, block;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;  // called once for every thread of the grid
  uint64_t seed = 0;                            // of the order of blocks and threads
};

// A copy of 16 bytes to shared memory that a thread has started and not waited for.
struct PendingCopy {
  void* to;
  const void* from;  // null: zeros
  int group;         // number of the thread's groups committed before it
};

// Runs kernels block after block on the calling host thread. The threads of a block run one after
// another until each ends or waits in a collective, then those that may go on do. Blocks and
// threads come in an order drawn from the seed. Keeps its stacks for the next kernel.
class BlockRunner {
 public:
  BlockRunner();
  ~BlockRunner();
  BlockRunner(const BlockRunner&) = delete;
  BlockRunner& operator=(const BlockRunner&) = delete;

  // Empty, or why the kernel failed.
  std::string Run(const KernelRun& run);

  // Of the kernel thread that is running on this host thread; none outside kernels.
  static BlockRunner& Current();

  int lane() const { return current_ & 31; }
  int block_threads() const { return threads_; }
  std::byte* shared() { return shared_; }
  // False when [p, p + bytes) is certainly no shared memory of the block.
  bool MayBeShared(const void* p, size_t bytes) const;
  void Collective(const char* what, uint32_t mask, void (*combine)(void* const*, uint32_t),
                  void* operand);
  int Barrier(bool predicate);
  [[noreturn]] void Fail(const char* why);
  // Copies of the running thread.
  void StartCopy(void* to, const void* from);
  void CommitCopies();
  void FinishCopies(int newest);  // all groups but the newest ones

 private:
  enum class Order { kForward, kBackward, kRandom };
  enum class State : uint8_t { kUnstarted, kReady, kRunning, kAtBarrier, kInCollective, kExited };
  struct Thread {
    State state;
    bool predicate;
    Fiber* fiber;  // while suspended
    const char* what;
    void (*combine)(void* const*, uint32_t);
    uint32_t mask;
    void* operand;
    int committed;  // groups of copies
  };

  void BeginBlock(const KernelRun& run, uint64_t number);
  void EndBlock(const KernelRun& run);
  void DrawOrder();
  int PickNext();
  void Suspend();
  void ThreadExited();
  void GoOn();  // on the fiber of a thread that has ended
  void GuardShared(size_t bytes);
  void AllReady();
  [[noreturn]] void Stop();  // as failure_ says
  [[noreturn]] void StopForWaits();
  std::string Waits() const;
  static std::string Place();  // of the block
  Fiber* FreeFiber();
  static void FiberMain(void* runner);
  uint64_t Random();

  const KernelRun* run_ = nullptr;
  std::string failure_;
  uint64_t random_ = 0;
  Order order_ = Order::kForward;
  int threads_ = 0, current_ = 0, live_ = 0;
  int at_barrier_ = 0, yes_ = 0, barrier_result_ = 0;
  uint32_t warps_ready_ = 0;
  int warp_ = 0;
  std::array<uint32_t, 32> ready_{};
  struct Warp {
    uint32_t gone;     // lanes that have returned or do not exist
    uint32_t waiting;  // lanes in a collective
  };
  std::array<Warp, 32> warps_{};
  std::array<Thread, 1024> thread_{};
  std::array<uint3, 1024> index_{};
  std::vector<std::vector<PendingCopy>> copies_;  // of each thread
  bool copied_ = false;

  Fiber* running_ = nullptr;
  std::optional<Fiber> main_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_fibers_;
  std::byte* shared_ = nullptr;
};

}  // namespace longspan::emulated
