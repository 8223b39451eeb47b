#pragma once
#include <optional>
#include <string>

#include "ops/core/context.h"
#include "ops/core/machine.h"

namespace longspan::launch {

// What makers state for dense matrix products: bf16 with f32 accumulation on tensor cores, f32
// without (no TF32), at boost clocks.
struct GpuPeaks {
  double bf16_gflops = 0, f32_gflops = 0;
};

// By the name that the driver gives ("NVIDIA H100 80GB HBM3"); nothing for a GPU that is not in the
// table, such as a slice of one (MIG) or its laptop version.
std::optional<GpuPeaks> KnownGpu(const std::string& name);

// The best rate of square products on this GPU now, in GFLOP/s: sizes grow up to 8192 until one
// takes 5 ms. Operands f32 or bf16.
double MeasureGemmGflops(Context& ctx, DType dtype);

// The figures that floors are stated against, measured now: products as above for bf16 and f32, and
// a copy of 256 MiB within device memory, bytes read + written.
MachinePeaks MeasureGpuPeaks(Context& ctx);

}  // namespace longspan::launch
