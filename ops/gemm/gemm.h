#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Matrix product C = op(A) op(B), or C += op(A) op(B), with op(X) = X or its transpose.
//
// Shapes    op(A) [M, K], op(B) [K, N], C [M, N], each stored row-major; a transposed operand is
//           stored as [K, M] or [N, K]. Any of M, N, K may be 0 (K = 0: C = 0, or C stays).
// Dtypes    A and B both f32 (C f32), both bf16 (C f32 or bf16), or both f64 (C f64)
//           on a GPU no f64
// Numerics  sums in f32, never TF32 (f64 for f64); a bf16 C is rounded once, after the sum. C
//           overlaps neither A nor B. On a CPU C is cut into tiles by its shape alone and each tile
//           is one task that one thread computes, so the bits do not depend on the number of
//           threads; on a GPU they depend on the shapes and on how the operands are aligned.
// Errors    InvalidArgument naming the operands or the implementation, before C is written;
//           Unsupported for f64 on a GPU
// Devices   cpu (ctx.Progress() runs between tiles), cuda
struct GemmOptions {
  bool accumulate = false;       // add to C instead of overwriting it
  std::string implementation{};  // empty: the first that accepts; else this one or InvalidArgument
};

// Returns the name of the implementation that ran.
const char* Gemm(Context& ctx, const Tensor& a, bool transpose_a, const Tensor& b, bool transpose_b,
                 Tensor& c, const GemmOptions& options = {});

// The implementation table, most specialised first, reference last. An entry runs on the device it
// names; asking for one of another device is refused.
//   cublaslt        cuBLASLt (GPU)
//   onednn          oneDNN on the operands as they are
//   onednn_widened  bf16 operands converted to f32 first, where oneDNN has no bf16 products for
//                   this processor
//   reference       own blocked loop, every dtype
struct GemmProblem {
  DType operands, result;
};
struct GemmImplementation {
  const char* name;
  DeviceKind device;
  // Why this entry cannot run the problem here; empty when it can.
  std::string (*rejects)(const GemmProblem& problem);
};
const std::vector<GemmImplementation>& GemmImplementations();

}  // namespace longspan::ops
