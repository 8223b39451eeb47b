#pragma once
#include <cuda_runtime_api.h>

namespace longspan::emulated {

// Keeps `error` for cudaGetLastError and returns it, or the failed state where there is one.
cudaError_t Report(cudaError_t error);

// The device's stream for null; the stream otherwise.
cudaStream_t Resolve(cudaStream_t stream);

}  // namespace longspan::emulated
