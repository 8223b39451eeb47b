#include "ops/core/parallel_for.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "ops/core/context.h"

namespace longspan {
namespace {

// The shared state of one ParallelFor: a ticket counter and the first exception.
struct Run {
  Run(int64_t count, const std::function<void(int64_t, int)>& body) : n(count), task(body) {}

  const int64_t n;
  const std::function<void(int64_t, int)>& task;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;

  void Work(int worker, Context* progress) {
    for (;;) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= n) return;
      try {
        task(i, worker);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next.store(n, std::memory_order_relaxed);
      }
      if (progress != nullptr) progress->Progress();
    }
  }
};

}  // namespace

int AvailableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

void ParallelFor(Context& ctx, int64_t n, const std::function<void(int64_t, int)>& task) {
  if (n <= 0) return;
  Run run(n, task);
  const int threads = static_cast<int>(std::min<int64_t>(ctx.threads(), n));
  if (threads == 1) {
    run.Work(0, &ctx);
  } else {
#ifdef LONGSPAN_PARALLEL_FOR_STD
    std::vector<std::thread> workers;
    for (int w = 1; w < threads; ++w) workers.emplace_back([&run, w] { run.Work(w, nullptr); });
    run.Work(0, &ctx);
    for (auto& worker : workers) worker.join();
#else
#pragma omp parallel num_threads(threads)
    {
      const int worker = omp_get_thread_num();
      run.Work(worker, worker == 0 ? &ctx : nullptr);
    }
#endif
  }
  if (run.error) std::rethrow_exception(run.error);
}

void ParallelRanges(Context& ctx, int64_t n, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  const int64_t tasks = (n + grain - 1) / grain;
  ParallelFor(ctx, tasks, [&](int64_t i, int) { body(i * grain, std::min(n, (i + 1) * grain)); });
}

ScopedLibraryThreads::ScopedLibraryThreads(const Context& ctx) : previous_(omp_get_max_threads()) {
  omp_set_num_threads(ctx.threads());
}
ScopedLibraryThreads::~ScopedLibraryThreads() { omp_set_num_threads(previous_); }

}  // namespace longspan
