#pragma once
#include <cstdint>
#include <functional>

namespace longspan {

class Context;

// Cores that this process may run on (its affinity mask), at least 1.
int AvailableCores();

// Runs task(i, worker) for every i in [0, n) on up to ctx.threads() threads, in order of i as
// threads become free, so callers put the longest tasks first. `worker` is in [0, ctx.threads())
// and is unique among tasks that run at the same time: use it to index scratch memory.
// The calling thread takes part and calls ctx.Progress() between its tasks. Tasks must be
// independent: results may not depend on which worker runs them. The first exception is rethrown
// on the calling thread after all workers have stopped.
void ParallelFor(Context& ctx, int64_t n,
                 const std::function<void(int64_t task, int worker)>& task);

// Splits [0, n) into ranges of `grain` elements (the last may be short) and runs body(begin, end)
// for each. The partition depends on n and grain only, never on the number of threads.
void ParallelRanges(Context& ctx, int64_t n, int64_t grain,
                    const std::function<void(int64_t begin, int64_t end)>& body);

// While alive, libraries that use OpenMP on this thread (oneDNN) run on ctx.threads() threads.
class ScopedLibraryThreads {
 public:
  explicit ScopedLibraryThreads(const Context& ctx);
  ~ScopedLibraryThreads();
  ScopedLibraryThreads(const ScopedLibraryThreads&) = delete;
  ScopedLibraryThreads& operator=(const ScopedLibraryThreads&) = delete;

 private:
  int previous_;
};

}  // namespace longspan
