// Compiled for AVX-512: nothing here may be shared with code that other processors run, so no
// standard headers and only internal linkage besides the table at the end.
#include <immintrin.h>

#include "ops/attention/cpu/avx512_logistic.h"
#include "ops/attention/cpu/block_kernels.h"

namespace longspan::ops::avx512 {
namespace {

constexpr int kLanes = 16;

void PackF32(const float* from, int64_t stride, int rows, int columns, int padded, float* to,
             int64_t ld) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < padded; c += kLanes) {
      const int left = columns - c;
      const __mmask16 mask = left >= kLanes ? 0xffff
                             : left > 0     ? static_cast<__mmask16>((1u << left) - 1)
                                            : 0;
      _mm512_store_ps(to + r * ld + c, _mm512_maskz_loadu_ps(mask, from + r * stride + c));
    }
  }
}

void PackBf16(const uint16_t* from, int64_t stride, int rows, int columns, int padded, float* to,
              int64_t ld) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < padded; c += kLanes) {
      const int left = columns - c;
      const __mmask16 mask = left >= kLanes ? 0xffff
                             : left > 0     ? static_cast<__mmask16>((1u << left) - 1)
                                            : 0;
      const __m512i half =
          _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + r * stride + c));
      _mm512_store_si512(to + r * ld + c, _mm512_slli_epi32(half, 16));
    }
  }
}

void Transpose(const float* from, int64_t ld, int rows, int columns, float* to) {
  const __m512i step =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(static_cast<int>(ld)));
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < 64; r += kLanes) {
      const int left = rows - r;
      const __mmask16 mask = left >= kLanes ? 0xffff
                             : left > 0     ? static_cast<__mmask16>((1u << left) - 1)
                                            : 0;
      const __m512 v = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, step, from + r * ld + c,
                                                sizeof(float));
      _mm512_store_ps(to + c * 64 + r, v);
    }
  }
}

// kRows x (16 kColumns) of the product stays in registers over the whole inner sum.
template <int kRows, int kColumns>
inline void Tile(const BlockGemm& g, int row, int column) {
  __m512 sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) sum[r][n] = _mm512_setzero_ps();
  }
  const float* a = g.a + row * g.a_row;
  const float* b = g.b + column;
  for (int t = 0; t < g.inner; ++t) {
    __m512 v[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) v[n] = _mm512_load_ps(b + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 x = _mm512_set1_ps(a[r * g.a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) sum[r][n] = _mm512_fmadd_ps(x, v[n], sum[r][n]);
    }
    a += g.a_inner;
    b += g.ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* c = g.c + (row + r) * g.ldc + column;
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      if (g.row_scale != nullptr) {
        const __m512 scale = _mm512_set1_ps(g.row_scale[row + r]);
        sum[r][n] = _mm512_fmadd_ps(scale, _mm512_load_ps(c + n * kLanes), sum[r][n]);
      }
      _mm512_store_ps(c + n * kLanes, sum[r][n]);
    }
  }
}

template <int kColumns>
inline void Panel(const BlockGemm& g, int column) {
  int row = 0;
  for (; row + 6 <= g.rows; row += 6) Tile<6, kColumns>(g, row, column);
  switch (g.rows - row) {
    case 1:
      Tile<1, kColumns>(g, row, column);
      break;
    case 2:
      Tile<2, kColumns>(g, row, column);
      break;
    case 3:
      Tile<3, kColumns>(g, row, column);
      break;
    case 4:
      Tile<4, kColumns>(g, row, column);
      break;
    case 5:
      Tile<5, kColumns>(g, row, column);
      break;
    default:
      break;
  }
}

void Gemm(const BlockGemm& g) {
  int column = 0;
  for (; column + 64 <= g.columns; column += 64) Panel<4>(g, column);
  switch ((g.columns - column) / kLanes) {
    case 1:
      Panel<1>(g, column);
      break;
    case 2:
      Panel<2>(g, column);
      break;
    case 3:
      Panel<3>(g, column);
      break;
    default:
      break;
  }
}

// 2^t for t <= 127; 0 below -126 (-inf included); NaN stays NaN. The polynomial is the minimax one
// of degree 6 on [-1/2, 1/2]; relative error below 1e-7.
inline __m512 Exp2(__m512 t) {
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 x = _mm512_sub_ps(t, whole);
  __m512 p = _mm512_set1_ps(0x1.41d334p-13f);
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.5f456ap-10f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.3b2dbcp-7f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.c6aed4p-5f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.ebfbdap-3f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.62e430p-1f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(1.0f));
  const __mmask16 keep = _mm512_cmp_ps_mask(t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(keep, p, whole);
}

inline __mmask16 LaneMask(const uint64_t* bits, int row, int lane) {
  return bits == nullptr ? static_cast<__mmask16>(0xffff)
                         : static_cast<__mmask16>(bits[row] >> lane);
}

void Softmax(const SoftmaxStep& step) {
  const __m512 none = _mm512_set1_ps(-__builtin_inff());
  const __m512 scale = _mm512_set1_ps(step.scale);
  for (int lane = 0; lane < 64; lane += kLanes) {
    float* s = step.s + lane;
    const __m512 before = _mm512_load_ps(step.maximum + lane);
    __m512 top = before;
    for (int k = 0; k < step.keys; ++k) {
      const __m512 score = _mm512_mul_ps(_mm512_load_ps(s + k * 64), scale);
      const __mmask16 seen = LaneMask(step.bits, k, lane);
      top = _mm512_mask_max_ps(top, seen, top, score);
    }
    _mm512_store_ps(step.maximum + lane, top);
    // A lane without any visible key subtracts 0, so that -inf - -inf never happens.
    const __mmask16 empty = _mm512_cmp_ps_mask(top, none, _CMP_EQ_OQ);
    const __m512 shift = _mm512_mask_mov_ps(top, empty, _mm512_setzero_ps());
    const __m512 rescale = Exp2(_mm512_sub_ps(before, shift));
    // Small terms would be lost one by one in the sum of a long row.
    __m512 sum = _mm512_setzero_ps();
    for (int k = 0; k < step.keys; ++k) {
      const __m512 t = _mm512_fmsub_ps(_mm512_load_ps(s + k * 64), scale, shift);
      const __m512 p = _mm512_maskz_mov_ps(LaneMask(step.bits, k, lane), Exp2(t));
      _mm512_store_ps(s + k * 64, p);
      sum = _mm512_add_ps(sum, p);
    }
    _mm512_store_ps(step.sum + lane,
                    _mm512_fmadd_ps(_mm512_load_ps(step.sum + lane), rescale, sum));
    _mm512_store_ps(step.rescale + lane, rescale);
  }
}

void Sigmoid(const SigmoidStep& step) {
  const __m512 scale = _mm512_set1_ps(step.scale), bias = _mm512_set1_ps(step.bias);
  for (int k = 0; k < step.keys; ++k) {
    for (int lane = 0; lane < 64; lane += kLanes) {
      float* s = step.s + k * 64 + lane;
      const __m512 t = _mm512_fmadd_ps(_mm512_load_ps(s), scale, bias);
      const __m512 p = LogisticOf(t, Exp2(MinusAbs(t))).p;
      _mm512_store_ps(s, _mm512_maskz_mov_ps(LaneMask(step.bits, k, lane), p));
    }
  }
}

template <bool kSigmoid>
inline void GradientRow(const GradientStep& step, int row, int lane, __m512 lse, __m512 delta) {
  float* s = step.s + row * 64 + lane;
  float* dp = step.dp + row * 64 + lane;
  const __mmask16 seen = LaneMask(step.bits, row, lane);
  const __m512 t = _mm512_fmsub_ps(_mm512_load_ps(s), _mm512_set1_ps(step.scale), lse);
  if constexpr (kSigmoid) {
    const LogisticLanes weight = LogisticOf(t, Exp2(MinusAbs(t)));
    _mm512_store_ps(s, _mm512_maskz_mov_ps(seen, weight.p));
    _mm512_store_ps(dp, _mm512_maskz_mul_ps(seen, weight.slope, _mm512_load_ps(dp)));
  } else {
    const __m512 p = _mm512_maskz_mov_ps(seen, Exp2(t));
    _mm512_store_ps(s, p);
    _mm512_store_ps(dp, _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(dp), delta)));
  }
}

template <bool kSigmoid>
void GradientByQuery(const GradientStep& step) {
  for (int lane = 0; lane < 64; lane += kLanes) {
    const __m512 lse = _mm512_load_ps(step.lse + lane), delta = _mm512_load_ps(step.delta + lane);
    for (int k = 0; k < step.rows; ++k) GradientRow<kSigmoid>(step, k, lane, lse, delta);
  }
}

template <bool kSigmoid>
void GradientByKey(const GradientStep& step) {
  for (int q = 0; q < step.rows; ++q) {
    const __m512 lse = _mm512_set1_ps(step.lse[q]), delta = _mm512_set1_ps(step.delta[q]);
    for (int lane = 0; lane < 64; lane += kLanes) GradientRow<kSigmoid>(step, q, lane, lse, delta);
  }
}

}  // namespace

const BlockKernels kBlockKernels = {PackF32,
                                    PackBf16,
                                    Transpose,
                                    Gemm,
                                    Softmax,
                                    GradientByQuery<false>,
                                    GradientByKey<false>,
                                    Sigmoid,
                                    GradientByQuery<true>,
                                    GradientByKey<true>};

}  // namespace longspan::ops::avx512
