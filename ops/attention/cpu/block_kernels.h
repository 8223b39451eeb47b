#pragma once
#include <stdint.h>

namespace longspan::ops {

// The inner loops of blocked attention, once per instruction set. Plain structs and function
// pointers only: code compiled for a special instruction set includes no other header that code of
// the baseline shares.
//
// Blocks are 64 tokens. "Lanes" are the 64 contiguous floats of a row of a score tile: the tile is
// [rows][64] with leading dimension 64.

// c[r][n] = sum_t a(r, t) * b[t][n] (+ row_scale[r] * c[r][n] when row_scale is given), where
// a(r, t) = a[r * a_row + t * a_inner]. `columns` is a multiple of 16; b and c are 64-byte aligned
// with leading dimensions that are multiples of 16.
struct BlockGemm {
  const float* a;
  int64_t a_row, a_inner;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int rows, columns, inner;
  const float* row_scale;
};

// One step of the online softmax; lanes are queries, rows are keys. Scores s become probabilities
// exp2(scale * s - maximum) with the running maximum (in units of log2) raised first; `sum` follows
// and `rescale` is what earlier output of a lane has to be multiplied by. A lane that has seen
// nothing yet keeps maximum = -inf. bits[key] masks the lanes, null: everything is visible.
struct SoftmaxStep {
  float* s;
  int keys;
  float scale;  // includes log2(e)
  const uint64_t* bits;
  float* maximum;
  float* sum;
  float* rescale;
};

// The step of sigmoid attention: scores become weights p = 1 / (1 + exp2(-scale * s - bias)).
struct SigmoidStep {
  float* s;
  int keys;
  float scale, bias;  // include log2(e)
  const uint64_t* bits;
};

// s becomes p = exp2(scale * s - lse), dp becomes ds = p * (dp - delta). With lanes = queries lse
// and delta are per lane and bits per row (key); with lanes = keys they are per row (query). lse
// is in units of log2. Of sigmoid p = 1 / (1 + exp2(lse - scale * s)), where lse is minus the bias,
// and ds = p * (1 - p) * dp.
struct GradientStep {
  float* s;
  float* dp;
  int rows;
  float scale;
  const uint64_t* bits;
  const float* lse;
  const float* delta;
};

struct BlockKernels {
  // to[r * ld + c] = from[r * stride + c] for c < columns, 0 up to `padded` (multiple of 16).
  void (*pack_f32)(const float* from, int64_t stride, int rows, int columns, int padded, float* to,
                   int64_t ld);
  void (*pack_bf16)(const uint16_t* from, int64_t stride, int rows, int columns, int padded,
                    float* to, int64_t ld);
  // to[c * 64 + r] = from[r * ld + c], 0 for rows <= r < 64.
  void (*transpose)(const float* from, int64_t ld, int rows, int columns, float* to);
  void (*gemm)(const BlockGemm& gemm);
  void (*softmax)(const SoftmaxStep& step);
  void (*gradient_by_query)(const GradientStep& step);  // lanes = queries
  void (*gradient_by_key)(const GradientStep& step);    // lanes = keys
  void (*sigmoid)(const SigmoidStep& step);
  void (*sigmoid_gradient_by_query)(const GradientStep& step);
  void (*sigmoid_gradient_by_key)(const GradientStep& step);
};

namespace portable {
extern const BlockKernels kBlockKernels;
}
namespace avx512 {
extern const BlockKernels kBlockKernels;
}

}  // namespace longspan::ops
