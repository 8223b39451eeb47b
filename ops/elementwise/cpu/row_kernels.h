#pragma once
#include <cstddef>
#include <cstdint>

#include "ops/core/dtype.h"
#include "ops/optim/adamw_rule.h"

namespace longspan::ops {

// The inner loops of the ops that move more than they compute, compiled once per instruction set
// from one text (row_loops.h). Each call is the work of one task on plain memory.
//
// Numerics  operands are widened to Real, every value is rounded once when stored. The bits of an
//           element do not depend on its place in the row; sums have an order fixed by their length.
//           Between instruction sets the last bits differ: products and sums are fused where that
//           is possible, and avx512_bf16 stores bf16 results below 2^-126 as 0, but for sums of
//           two and conversions.
// Aliasing  outputs overlap no input, except where one pointer is both
// Streaming there are two tables of a set, with the same bits: the kernels of a streaming one write
//           the outputs of add to rope past the caches, which saves reading the lines that they
//           fill. Nothing may be in place there
template <class T>
struct RowKernels {
  using Real = Accumulator<T>;
  // The dtype that T mixes with: bf16 for f32 and f32 for bf16 (f64 mixes with none).
  using Other = std::conditional_t<std::is_same_v<T, float>, BF16,
                                   std::conditional_t<std::is_same_v<T, BF16>, float, double>>;

  // out = a + b; both operands may be `out`.
  void (*add)(int64_t n, const T* a, const T* b, T* out);
  void (*add_other)(int64_t n, const T* a, const Other* b, T* out);
  void (*to_other)(int64_t n, const T* from, Other* to);

  // embedding/embedding.h: row t of `out` is row ids[t] of the table; the row `tokens[i]` of `from`
  // is added to the row ids[tokens[i]] of `sums` for i = 0, 1, ... Only the first `columns` of a
  // row are looked at.
  void (*gather)(int64_t rows, int64_t width, const int32_t* ids, const T* table, T* out);
  void (*gather_other)(int64_t rows, int64_t width, const int32_t* ids, const T* table, Other* out);
  void (*scatter_add)(int64_t count, const int32_t* tokens, const int32_t* ids, int64_t width,
                      int64_t columns, const T* from, Real* sums);

  double (*sum_of_squares)(int64_t n, const T* x);

  // activation/formulas.h
  void (*gelu)(int64_t n, const T* x, T* y);
  void (*gelu_backward)(int64_t n, const T* dy, const T* x, T* dx);
  void (*swiglu)(int64_t n, const T* gate, const T* up, T* y);
  void (*swiglu_backward)(int64_t n, const T* dy, const T* gate, const T* up, T* dgate, T* dup);

  // norm/rms_norm.h, rows of `width`; dw += the weight gradient of these rows.
  void (*rms_norm)(int64_t rows, int64_t width, const T* x, const Real* w, double eps, T* y,
                   Real* rstd);
  void (*rms_norm_backward)(int64_t rows, int64_t width, const T* dy, const T* x, const Real* w,
                            const Real* rstd, T* dx, Real* dw);

  // rope/rope.h: `heads` heads of 2 * half elements of each token turn by that token's angles, or
  // back by them where `direction` is -1.
  void (*rope)(int64_t tokens, int64_t heads, int64_t half, const T* x, const Real* cosines,
               const Real* sines, Real direction, T* y);

  // optim/adamw.h for gradients g * scale; `copy`, unless it is null, receives p rounded.
  void (*adamw)(int64_t n, const internal::AdamWRule<Real>& rule, Real scale, const Real* g,
                Real* p, Real* m, Real* v, BF16* copy);

  // loss/linear_cross_entropy.h. log_sum_exp: of one row of logits. softmax_gradient:
  // out = e^(logits - lse) * factor, in place where T is Real.
  Real (*log_sum_exp)(int64_t n, const Real* logits);
  void (*softmax_gradient)(int64_t n, const Real* logits, Real lse, Real factor, T* out);
};

// The kernels of one instruction set.
struct RowKernelSet {
  const char* name;
  RowKernels<float> f32;
  RowKernels<BF16> bf16;
  RowKernels<float> f32_streaming;
  RowKernels<BF16> bf16_streaming;
};

namespace portable {
extern const RowKernelSet kRowKernels;
extern const RowKernels<double> kRowKernelsF64;
}  // namespace portable
namespace avx2 {
extern const RowKernelSet kRowKernels;
}
namespace avx512 {
extern const RowKernelSet kRowKernels;
}
namespace avx512_bf16 {
extern const RowKernelSet kRowKernels;
}

namespace internal {

// All sets that this processor can run, the fastest first, "portable" last.
struct RowKernelChoices {
  const RowKernelSet* sets[4];
  int count;
};
const RowKernelChoices& AvailableRowKernels();

// Outputs of an op that take more are streamed. Far more than a core's share of any cache, so that
// what reads them next would hardly find them there; below it, it may. (Asking the machine for its
// caches would not help: what a guest is told of the last level can be that of a whole socket.)
constexpr size_t kStreamingBytes = size_t{8} << 20;

// Those in use: the fastest, for an op whose outputs take so many bytes. Without the bytes nothing
// is streamed.
template <class T>
const RowKernels<T>& Rows(size_t output_bytes = 0);

}  // namespace internal
}  // namespace longspan::ops
