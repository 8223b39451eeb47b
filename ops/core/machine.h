#pragma once
#include <string>

#include "ops/core/context.h"

namespace longspan {

// What this machine does at most, measured now, on ctx.threads() threads. The figures that floors,
// fractions and MFU are stated against.
struct MachinePeaks {
  double f32_gflops = 0;  // fused multiply-add on registers, best instruction set here
  double bf16_gflops =
      0;                 // bf16 dot products with f32 accumulation; f32_gflops when there are none
  double copy_gbps = 0;  // large copy, bytes read + bytes written
  std::string f32_set,
      bf16_set;                // "amx_bf16", "avx512_bf16", "avx512", "portable"; of a GPU "gemm"
  int threads = 0;             // of the host
  std::string device = "cpu";  // or "cuda"
  std::string name;            // of a GPU
};

// Takes about `seconds` per figure.
MachinePeaks MeasurePeaks(Context& ctx, double seconds = 0.05);

}  // namespace longspan
