#pragma once
#include <cstdint>

#include "ops/core/dtype.h"
#include "ops/optim/adamw_rule.h"

namespace longspan::ops {

// The inner loops of the ops that move more than they compute, compiled once per instruction set
// from one text (row_loops.h). Each call is the work of one task on plain memory.
//
// Numerics  operands are widened to Real, every value is rounded once when stored. An element's
// bits
//           do not depend on its place in the row, and sums have an order fixed by their length.
//           Between instruction sets the last bits differ: products and sums are fused where that
//           is possible, and avx512_bf16 stores bf16 results below 2^-126 as 0, but for sums of
//           two and conversions.
// Aliasing  outputs overlap no input, except where one pointer is both
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
  void (*accumulate)(int64_t n, const T* from, Real* sums);  // sums += from
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

// Those in use: the fastest.
template <class T>
const RowKernels<T>& Rows();

}  // namespace internal
}  // namespace longspan::ops
