#pragma once
#include <functional>
#include <memory>

#include "ops/core/allocator.h"
#include "ops/core/device.h"
#include "ops/core/tensor.h"
#include "ops/core/trace.h"

namespace longspan {

struct ContextOptions {
  Device device{};
  int threads = 0;                       // host threads for kernels; 0 = all cores of the process
  bool deterministic = true;             // same bits for the same layout; CPU kernels always are
  bool poison_buffers = kPoisonDefault;  // fill fresh memory with NaN bytes
  bool sync_checks = false;  // GPU: wait after every kernel, so that errors have a place

#ifdef NDEBUG
  static constexpr bool kPoisonDefault = false;
#else
  static constexpr bool kPoisonDefault = true;
#endif
};

namespace cuda {
class Runtime;
}

// Everything an op needs besides its operands: device, memory, threads, timers, and the hook that
// kernels call between tasks so that messages move while they compute. One per rank; several can
// live in one process. A Context is used by one thread at a time (kernels fan out internally).
class Context {
 public:
  explicit Context(ContextOptions options = {});

  Device device() const { return options_.device; }
  int threads() const { return options_.threads; }
  bool deterministic() const { return options_.deterministic; }

  Tensor Empty(Shape shape, DType dtype);  // uninitialised
  Tensor Zeros(Shape shape, DType dtype);
  void SetZero(const Tensor& t);  // all bytes of a tensor on this device

  // Called on the Context's own thread between kernel tasks; must be cheap and must not throw.
  void SetProgress(std::function<void()> progress) { progress_ = std::move(progress); }
  void Progress() {
    if (progress_) progress_();
  }

  // The GPU of this Context; InvalidArgument on another device.
  cuda::Runtime& cuda() const {
    LONGSPAN_CHECK(runtime_ != nullptr)
        << "a GPU is needed, and the device is " << ToString(options_.device);
    return *runtime_;
  }

  // The same for those that keep it (Communicator::UseDevice); null on another device.
  const std::shared_ptr<cuda::Runtime>& runtime() const { return runtime_; }

  Trace& trace() { return *trace_; }
  Allocator& allocator() { return *allocator_; }

 private:
  ContextOptions options_;
  std::shared_ptr<cuda::Runtime> runtime_;  // on a GPU only
  std::shared_ptr<Allocator> allocator_;
  std::shared_ptr<Trace> trace_;
  std::function<void()> progress_;
};

}  // namespace longspan
