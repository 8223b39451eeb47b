#include "tests/emulated_cuda/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif
#ifdef LONGSPAN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef LONGSPAN_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace longspan::emulated {
namespace {

constexpr size_t kPage = 4096;

// Between Prepare or SwitchTo and the first lines that run afterwards, on the same host thread.
thread_local Fiber* arriving = nullptr;
thread_local Fiber* leaving = nullptr;

}  // namespace

// longspan_emulated_switch(void** from, void* to) saves the registers that a called function must
// keep on the running stack, stores the stack pointer in *from, and restores those at `to`.
#if defined(__x86_64__)
extern "C" void longspan_emulated_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl longspan_emulated_switch
.hidden longspan_emulated_switch
.type longspan_emulated_switch,@function
longspan_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size longspan_emulated_switch,.-longspan_emulated_switch
)");
namespace {
// A stack from which the switch returns into `start`, aligned as if it had been called.
void* FirstStackPointer(std::byte* top, void (*start)()) {
  auto* p = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--p = nullptr;  // the return address of `start`: none
  *--p = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  return p;
}
}  // namespace
#elif defined(__aarch64__)
extern "C" void longspan_emulated_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl longspan_emulated_switch
.hidden longspan_emulated_switch
.type longspan_emulated_switch,%function
longspan_emulated_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size longspan_emulated_switch,.-longspan_emulated_switch
)");
namespace {
void* FirstStackPointer(std::byte* top, void (*start)()) {
  auto* p = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 160);
  for (int i = 0; i < 20; ++i) p[i] = nullptr;
  p[11] = reinterpret_cast<void*>(start);  // x30, where `ret` goes
  return p;
}
}  // namespace
#else
namespace {
void longspan_emulated_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
// The first context lies at the low end of the stack, away from the frames of `start`.
void* FirstStackPointer(std::byte* top, void (*start)(), std::byte* low) {
  auto* context = new (low) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = low + sizeof(ucontext_t);
  context->uc_stack.ss_size = static_cast<size_t>(top - low) - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, start, 0);
  return context;
}
}  // namespace
#endif

Fiber::Fiber() {
#ifdef LONGSPAN_TSAN
  record_ = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(size_t stack_bytes, size_t colour)
    : mapping_bytes_(stack_bytes + kPage), colour_(colour) {
  void* p = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<std::byte*>(p);
  if (mprotect(mapping_, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  low_ = mapping_ + kPage;
  bytes_ = stack_bytes;
#ifdef LONGSPAN_TSAN
  record_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
#ifdef LONGSPAN_TSAN
  __tsan_destroy_fiber(record_);
#endif
  munmap(mapping_, mapping_bytes_);
}

void Fiber::Prepare(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  std::byte* top = mapping_ + mapping_bytes_ - colour_;
#ifdef LONGSPAN_ASAN
  // What the few frames left that were on the stack when it was left for good.
  __asan_unpoison_memory_region(top - kPage, kPage);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  stack_pointer_ = FirstStackPointer(top, &Fiber::Start);
#else
  stack_pointer_ = FirstStackPointer(top, &Fiber::Start, mapping_ + kPage);
#endif
}

void Fiber::Abandon() {
#ifdef LONGSPAN_ASAN
  __asan_unpoison_memory_region(low_, bytes_);  // what its frames left
  record_ = nullptr;
#endif
}

void Fiber::Start() {
  Fiber* self = arriving;
  self->Entered();
  self->entry_(self->argument_);
}

void Fiber::SwitchTo(Fiber& from, Fiber& to, bool for_good) {
  arriving = &to;
  leaving = &from;
#ifdef LONGSPAN_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.record_, to.low_, to.bytes_);
  if (for_good) from.record_ = nullptr;
#endif
#ifdef LONGSPAN_TSAN
  __tsan_switch_to_fiber(to.record_, 0);
#endif
  static_cast<void>(for_good);
  longspan_emulated_switch(&from.stack_pointer_, to.stack_pointer_);
  from.Entered();
}

void Fiber::Entered() {
#ifdef LONGSPAN_ASAN
  const void* low = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(record_, &low, &bytes);
  record_ = nullptr;
  if (leaving->mapping_ == nullptr) {  // the thread's own stack, which only the sanitizer knows
    leaving->low_ = low;
    leaving->bytes_ = bytes;
  }
#endif
}

}  // namespace longspan::emulated
