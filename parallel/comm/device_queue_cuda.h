#pragma once
#include "ops/core/cuda/runtime.h"
#include "parallel/comm/device_queue.h"

namespace longspan::parallel::internal {

// The stream of a queue, for libraries that are given one (NCCL).
cudaStream_t StreamOf(DeviceQueue& queue);

// DeviceQueue::Reduce on `stream`.
void ReduceRanks(cuda::Runtime& runtime, cudaStream_t stream, std::span<const void* const> sources,
                 std::span<void* const> targets, int64_t n, DType dtype, ReduceOp op);

}  // namespace longspan::parallel::internal
