#pragma once

// The two functions of NVTX that ops/core/cuda/nvtx_cuda.cpp calls, counted for tests.
namespace longspan::emulated {
struct NvtxCounts {
  int depth = 0;         // ranges open on this thread
  long long pushed = 0;  // since its start
  int deepest = 0;
};
inline NvtxCounts& Nvtx() {
  thread_local NvtxCounts counts;
  return counts;
}
}  // namespace longspan::emulated

inline int nvtxRangePushA(const char*) {
  auto& counts = longspan::emulated::Nvtx();
  ++counts.pushed;
  if (++counts.depth > counts.deepest) counts.deepest = counts.depth;
  return counts.depth - 1;
}
inline int nvtxRangePop() { return --longspan::emulated::Nvtx().depth; }
