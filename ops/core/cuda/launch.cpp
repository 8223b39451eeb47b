#include "ops/core/cuda/launch.h"

#include "ops/core/check.h"

namespace longspan::cuda {

unsigned GridSize(int64_t blocks) {
  constexpr int64_t kMost = 0x7fffffff;
  LONGSPAN_CHECK(blocks >= 0 && blocks <= kMost)
      << "a grid of " << blocks << " blocks; at most " << kMost << " are possible";
  return static_cast<unsigned>(blocks);
}

namespace internal {
namespace {

// A kernel that has not asked may use 48 KiB, static shared memory included, of which no kernel has
// more than the difference.
constexpr size_t kSharedWithoutAsking = 32 * 1024;

void CheckShape(const Runtime& runtime, const char* name, const LaunchShape& s) {
  const cudaDeviceProp& p = runtime.properties();
  const auto fits = [](unsigned value, int limit) { return value <= static_cast<unsigned>(limit); };
  LONGSPAN_CHECK(fits(s.grid.x, p.maxGridSize[0]) && fits(s.grid.y, p.maxGridSize[1]) &&
                 fits(s.grid.z, p.maxGridSize[2]))
      << name << ": a grid of " << s.grid.x << " x " << s.grid.y << " x " << s.grid.z;
  const unsigned threads = s.block.x * s.block.y * s.block.z;
  LONGSPAN_CHECK(threads > 0 && fits(threads, p.maxThreadsPerBlock))
      << name << ": " << threads << " threads a block";
  LONGSPAN_CHECK(s.shared_bytes <= p.sharedMemPerBlockOptin)
      << name << ": " << s.shared_bytes << " bytes of shared memory of "
      << p.sharedMemPerBlockOptin;
}

}  // namespace

void LaunchChecked(Runtime& runtime, const char* name, const void* kernel, LaunchShape shape,
                   void** arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  CheckShape(runtime, name, shape);
  runtime.MakeCurrent();
  if (shape.shared_bytes > kSharedWithoutAsking) {
    LONGSPAN_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shape.shared_bytes)));
    // A driver that keeps more of the memory as L1 cache would hold fewer blocks at once.
    LONGSPAN_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                       cudaSharedmemCarveoutMaxShared));
  }
  const cudaStream_t stream = shape.stream != nullptr ? shape.stream : runtime.stream();
  const cudaError_t status =
      cudaLaunchKernel(kernel, shape.grid, shape.block, arguments, shape.shared_bytes, stream);
  Check(status, name, __FILE__, __LINE__);
  if (runtime.sync_checks()) Check(cudaStreamSynchronize(stream), name, __FILE__, __LINE__);
}

}  // namespace internal
}  // namespace longspan::cuda
