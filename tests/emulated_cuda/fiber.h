#pragma once
#include <cstddef>

// Flows of control within one host thread, each with a stack of its own.

#if defined(__SANITIZE_ADDRESS__)
#define LONGSPAN_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define LONGSPAN_TSAN 1
#endif

namespace longspan::emulated {

// A fiber, or with the default constructor the place for the thread's own flow while fibers run.
class Fiber {
 public:
  Fiber();
  explicit Fiber(size_t stack_bytes, size_t colour);  // the top of the stack is moved by `colour`
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls entry(argument), which never returns.
  void Prepare(void (*entry)(void*), void* argument);

  // Suspends the running flow, which is `from`, and goes on with `to`.
  static void Switch(Fiber& from, Fiber& to) { SwitchTo(from, to, false); }
  // The same; `from` is not resumed before it is prepared again.
  static void Leave(Fiber& from, Fiber& to) { SwitchTo(from, to, true); }
  bool HasOnStack(const void* p) const { return p >= mapping_ && p < mapping_ + mapping_bytes_; }
  // The fiber will be prepared again although it is suspended somewhere.
  void Abandon();

 private:
  static void SwitchTo(Fiber& from, Fiber& to, bool for_good);
  static void Start();
  void Entered();  // after every switch to this flow

  void* stack_pointer_ = nullptr;  // while suspended
  std::byte* mapping_ = nullptr;   // guard page, then the stack
  size_t mapping_bytes_ = 0, colour_ = 0;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  // For the sanitizers: the bounds of the stack and their own record of it.
  const void* low_ = nullptr;
  size_t bytes_ = 0;
  void* record_ = nullptr;
};

}  // namespace longspan::emulated
