// Reduction over the buffers of ranks that share one GPU, in rank order for every element.
#include <algorithm>
#include <cstdint>

#include "ops/core/check.h"
#include "ops/core/cuda/launch.h"
#include "parallel/comm/device_queue_cuda.h"

namespace longspan::parallel::internal {
namespace {

struct Buffers {
  const void* sources[kMaxReduceRanks];
  void* targets[kMaxReduceRanks];
  int num_sources, num_targets;
};

template <class T>
__device__ T Combine(T a, T b, ReduceOp op) {
  if (op == ReduceOp::kSum) return a + b;
  if (op == ReduceOp::kMax) return a < b ? b : a;
  return b < a ? b : a;
}

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// Each thread combines kWidth neighbouring elements and has read them all before it stores, so a
// target may be a source.
template <class T, int kWidth>
__global__ void ReduceRanksKernel(const __grid_constant__ Buffers buffers, int64_t packs,
                                  ReduceOp op) {
  using P = Pack<T, kWidth>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs;
       i += stride) {
    P sum = static_cast<const P*>(buffers.sources[0])[i];
    for (int r = 1; r < buffers.num_sources; ++r) {
      const P x = static_cast<const P*>(buffers.sources[r])[i];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum.values[j] = Combine(sum.values[j], x.values[j], op);
    }
    for (int t = 0; t < buffers.num_targets; ++t) static_cast<P*>(buffers.targets[t])[i] = sum;
  }
}

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

template <class T, int kWidth>
void Run(cuda::Runtime& runtime, cudaStream_t stream, const Buffers& buffers, int64_t packs,
         ReduceOp op) {
  if (packs == 0) return;
  const int64_t blocks = std::min(kMaxBlocks, (packs + kThreads - 1) / kThreads);
  cuda::LaunchShape shape{dim3(cuda::GridSize(blocks)), dim3(kThreads)};
  shape.stream = stream;
  cuda::Launch(runtime, "ReduceRanks", ReduceRanksKernel<T, kWidth>, shape, buffers, packs, op);
}

bool Aligned(const Buffers& b) {
  uintptr_t bits = 0;
  for (int i = 0; i < b.num_sources; ++i) bits |= reinterpret_cast<uintptr_t>(b.sources[i]);
  for (int i = 0; i < b.num_targets; ++i) bits |= reinterpret_cast<uintptr_t>(b.targets[i]);
  return bits % 16 == 0;
}

// 16 bytes at a time where all buffers allow it; the rest one by one.
template <class T>
void RunAll(cuda::Runtime& runtime, cudaStream_t stream, Buffers b, int64_t n, ReduceOp op) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t packs = Aligned(b) ? n / kWidth : 0;
  Run<T, kWidth>(runtime, stream, b, packs, op);
  const int64_t done = packs * kWidth;
  for (int i = 0; i < b.num_sources; ++i) b.sources[i] = static_cast<const T*>(b.sources[i]) + done;
  for (int i = 0; i < b.num_targets; ++i) b.targets[i] = static_cast<T*>(b.targets[i]) + done;
  Run<T, 1>(runtime, stream, b, n - done, op);
}

}  // namespace

void ReduceRanks(cuda::Runtime& runtime, cudaStream_t stream, std::span<const void* const> sources,
                 std::span<void* const> targets, int64_t n, DType dtype, ReduceOp op) {
  LONGSPAN_CHECK(!sources.empty() && sources.size() <= kMaxReduceRanks &&
                 targets.size() <= kMaxReduceRanks)
      << "a reduction over " << sources.size() << " ranks on one GPU; at most " << kMaxReduceRanks;
  Buffers b{};
  std::copy(sources.begin(), sources.end(), b.sources);
  std::copy(targets.begin(), targets.end(), b.targets);
  b.num_sources = static_cast<int>(sources.size());
  b.num_targets = static_cast<int>(targets.size());
  switch (dtype) {
    case DType::kF32:
      return RunAll<float>(runtime, stream, b, n, op);
    case DType::kF64:
      return RunAll<double>(runtime, stream, b, n, op);
    case DType::kI32:
      return RunAll<int32_t>(runtime, stream, b, n, op);
    case DType::kI64:
      return RunAll<int64_t>(runtime, stream, b, n, op);
    default:
      throw InvalidArgument(Str("ReduceRanks of ", ToString(dtype)));
  }
}

}  // namespace longspan::parallel::internal
