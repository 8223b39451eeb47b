// Compiled for AVX-512 with its bf16 dot product: nothing here may be shared with code that other
// processors run, so no standard headers and only internal linkage besides the table at the end.
#include <immintrin.h>

#include "ops/attention/cpu/avx512_logistic.h"
#include "ops/attention/cpu/bf16_kernels.h"

namespace longspan::ops::avx512_bf16 {
namespace {

constexpr int kVector = 16;  // f32 of a register
constexpr int kLanes = 64;
constexpr int kLaneRow = 2 * kLanes;  // elements of a row of pairs

inline __mmask32 FirstWords(int n) { return n >= 32 ? 0xffffffffu : n > 0 ? (1u << n) - 1 : 0u; }
inline __mmask16 FirstLanes(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0u);
}

// ---- product ---------------------------------------------------------------------------------

inline __m512bh PairEverywhere(const uint16_t* at) {
  int pair;
  __builtin_memcpy(&pair, at, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}
inline __m512bh LoadPairs(const uint16_t* at) {
  return reinterpret_cast<__m512bh>(_mm512_load_si512(at));
}

// kRows x 64 of the product stays in registers over the whole inner sum, which joins what is there
// in one addition: small terms would be lost one by one in the sum of a long row.
template <int kRows>
inline void Tile(const Bf16Gemm& g, int row) {
  __m512 sum[kRows][4];
  float* c = g.c + row * kLanes;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      sum[r][n] = _mm512_setzero_ps();
    }
  }
  if (g.add) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) __builtin_prefetch(c + r * kLanes + n * kVector, 1);
    }
  }
  for (int i = 0; i < g.count; ++i) {
    const uint16_t* a = g.products[i].a + row * g.a_row;
    const uint16_t* b = g.products[i].b;
    for (int t = 0; t < g.products[i].inner; t += 2) {
      __m512bh v[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) v[n] = LoadPairs(b + 2 * n * kVector);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512bh x = PairEverywhere(a + r * g.a_row);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], x, v[n]);
      }
      a += 2;
      b += kLaneRow;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      float* at = c + r * kLanes + n * kVector;
      _mm512_store_ps(at, g.add ? _mm512_add_ps(_mm512_load_ps(at), sum[r][n]) : sum[r][n]);
    }
  }
}

// Six rows at a time; what is left in pieces of at least three where there are that many, since few
// sums in flight wait for each other.
void Gemm(const Bf16Gemm& g) {
  const int parts = (g.rows + 5) / 6;
  int row = 0;
  while (g.rows - row >= 6 && g.rows - row != 8) {
    AskFor(g, row / 6, parts);
    Tile<6>(g, row);
    row += 6;
  }
  for (int part = row / 6; part < parts; ++part) AskFor(g, part, parts);
  if (g.rows - row == 8) {
    Tile<4>(g, row);
    row += 4;
  }
  switch (g.rows - row) {
    case 1:
      Tile<1>(g, row);
      break;
    case 2:
      Tile<2>(g, row);
      break;
    case 3:
      Tile<3>(g, row);
      break;
    case 4:
      Tile<4>(g, row);
      break;
    case 5:
      Tile<5>(g, row);
      break;
    default:
      break;
  }
}

// ---- forms of an operand ---------------------------------------------------------------------

void CopyRows(const uint16_t* from, int64_t stride, int tokens, int dim, int padded, uint16_t* to) {
  for (int t = 0; t < kLanes; ++t) {
    for (int d = 0; d < padded; d += 32) {
      const __mmask32 mask = t < tokens ? FirstWords(dim - d) : 0u;
      _mm512_store_si512(to + t * padded + d,
                         _mm512_maskz_loadu_epi16(mask, from + t * stride + d));
    }
  }
}

void RoundRows(const float* from, int64_t stride, int tokens, int dim, int padded, uint16_t* to) {
  for (int t = 0; t < kLanes; ++t) {
    for (int d = 0; d < padded; d += kVector) {
      const __mmask16 mask = t < tokens ? FirstLanes(dim - d) : static_cast<__mmask16>(0);
      const __m512 row = _mm512_maskz_loadu_ps(mask, from + t * stride + d);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + t * padded + d),
                         reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(row)));
    }
  }
}

// Row i, element j of a 16 x 16 matrix of 32-bit elements becomes row j, element i.
inline void Transpose16(__m512i (&m)[16]) {
  __m512i u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(m[i + 2], m[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(m[i + 2], m[i + 3]);
    u[i] = _mm512_unpacklo_epi64(a, c);
    u[i + 1] = _mm512_unpackhi_epi64(a, c);
    u[i + 2] = _mm512_unpacklo_epi64(b, d);
    u[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // u[4 g + j] holds rows 4 g .. 4 g + 3 of columns j, 4 + j, 8 + j and 12 + j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    m[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    m[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    m[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    m[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

void ToLanes(const uint16_t* rows, int64_t ld, int padded, uint16_t* to) {
  for (int t = 0; t < kLanes; t += 16) {
    for (int d = 0; d < padded; d += 32) {
      __m512i m[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) m[i] = _mm512_loadu_si512(rows + (t + i) * ld + d);
      Transpose16(m);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (d / 2 + i) * kLaneRow + 2 * t, m[i]);
    }
  }
}

void ToColumns(const uint16_t* rows, int64_t ld, int padded, uint16_t* to) {
  for (int t = 0; t < kLanes; t += 32) {
    for (int d = 0; d < padded; d += 16) {
      __m512i m[16];  // of two tokens each: one in the lower half of each element, one in the upper
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const uint16_t* row = rows + (t + 2 * i) * ld + d;
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + ld));
        m[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      }
      Transpose16(m);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (d + i) * kLanes + t, m[i]);
    }
  }
}

// ---- softmax, sigmoid and their gradients ------------------------------------------------------

// 2^t for t <= 127; 0 below -150 (-inf included); NaN stays NaN. The polynomial is the minimax one
// of degree 5 on [-1/2, 1/2]; relative error below 3e-7.
inline __m512 Exp2(__m512 t) {
  t = _mm512_max_ps(_mm512_set1_ps(-160.0f), t);
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 x = _mm512_sub_ps(t, whole);
  __m512 p = _mm512_set1_ps(0x1.5c08e6p-10f);
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.3d0c52p-7f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.c6b6e4p-5f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.ebf918p-3f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0x1.62e428p-1f));
  p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

inline __mmask16 LaneMask(const uint64_t* bits, int row, int lane) {
  return bits == nullptr ? static_cast<__mmask16>(0xffff)
                         : static_cast<__mmask16>(bits[row] >> lane);
}

// Rows r and r + 1 of 16 lanes, rounded, side by side.
inline __m512bh Pair(__m512 first, __m512 second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(order, both));
}
inline void StorePair(uint16_t* to, __m512bh pair) {
  _mm512_store_si512(to, reinterpret_cast<__m512i>(pair));
}

inline void StoreRow(uint16_t* to, __m512 row) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to),
                     reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(row)));
}

// Rows of pairs from `first_row` on; of a [64][64] matrix the same bytes.
inline void ClearPairs(uint16_t* lanes, int first_row) {
  for (int row = first_row; row < 64; row += 2) {
    for (int i = 0; i < kLaneRow; i += 32) {
      _mm512_store_si512(lanes + row / 2 * kLaneRow + i, _mm512_setzero_si512());
    }
  }
}

// The running state of 16 lanes moves to what the next probabilities are relative to.
inline bool RaiseMaximum(const Bf16Softmax& g, int lane) {
  const __m512 none = _mm512_set1_ps(-__builtin_inff());
  const __m512 scale = _mm512_set1_ps(g.scale);
  __m512 top = none;
  for (int k = 0; k < g.keys; ++k) {
    const __m512 score = _mm512_mul_ps(_mm512_load_ps(g.s + k * kLanes + lane), scale);
    top = _mm512_mask_max_ps(top, LaneMask(g.bits, k, lane), top, score);
  }
  const __m512 before = _mm512_load_ps(g.maximum + lane);
  const __mmask16 raised =
      _mm512_cmp_ps_mask(top, _mm512_add_ps(before, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
  if (raised == 0) {
    _mm512_store_ps(g.rescale + lane, _mm512_set1_ps(1.0f));
    return false;
  }
  const __m512 after = _mm512_mask_mov_ps(before, raised, top);
  const __m512 rescale =
      _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), raised, Exp2(_mm512_sub_ps(before, after)));
  _mm512_store_ps(g.maximum + lane, after);
  _mm512_store_ps(g.rescale + lane, rescale);
  _mm512_store_ps(g.sum + lane, _mm512_mul_ps(_mm512_load_ps(g.sum + lane), rescale));
  _mm512_store_ps(g.weight + lane, _mm512_mul_ps(_mm512_load_ps(g.weight + lane), rescale));
  return true;
}

bool Softmax(const Bf16Softmax& g) {
  const __m512 scale = _mm512_set1_ps(g.scale);
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  bool raised = false;
  for (int lane = 0; lane < kLanes; lane += kVector) {
    raised |= RaiseMaximum(g, lane);
    const __m512 maximum = _mm512_load_ps(g.maximum + lane);
    // A lane without any visible key subtracts 0, so that -inf - -inf never happens.
    const __mmask16 seen =
        _mm512_cmp_ps_mask(maximum, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
    const __m512 shift = _mm512_maskz_mov_ps(seen, maximum);
    const auto probability = [&](int k) __attribute__((always_inline)) {
      const __m512 t = _mm512_fmsub_ps(_mm512_load_ps(g.s + k * kLanes + lane), scale, shift);
      return _mm512_maskz_mov_ps(LaneMask(g.bits, k, lane), Exp2(t));
    };
    // Of this block: added to the state at once, for the reason given at Tile.
    __m512 sum = _mm512_setzero_ps(), weight = _mm512_setzero_ps();
    int k = 0;
    for (; k + 2 <= g.keys; k += 2) {
      const __m512 p0 = probability(k), p1 = probability(k + 1);
      const __m512bh pair = Pair(p0, p1);
      StorePair(g.p + k / 2 * kLaneRow + 2 * lane, pair);
      weight = _mm512_dpbf16_ps(weight, pair, ones);
      sum = _mm512_add_ps(sum, _mm512_add_ps(p0, p1));
    }
    if (k < g.keys) {
      const __m512 p0 = probability(k);
      const __m512bh pair = Pair(p0, _mm512_setzero_ps());
      StorePair(g.p + k / 2 * kLaneRow + 2 * lane, pair);
      weight = _mm512_dpbf16_ps(weight, pair, ones);
      sum = _mm512_add_ps(sum, p0);
    }
    _mm512_store_ps(g.sum + lane, _mm512_add_ps(_mm512_load_ps(g.sum + lane), sum));
    _mm512_store_ps(g.weight + lane, _mm512_add_ps(_mm512_load_ps(g.weight + lane), weight));
  }
  ClearPairs(g.p, (g.keys + 1) / 2 * 2);
  return raised;
}

void Sigmoid(const Bf16Sigmoid& g) {
  const __m512 scale = _mm512_set1_ps(g.scale), bias = _mm512_set1_ps(g.bias);
  for (int lane = 0; lane < kLanes; lane += kVector) {
    const auto weight = [&](int k) {
      const __m512 t = _mm512_fmadd_ps(_mm512_load_ps(g.s + k * kLanes + lane), scale, bias);
      return _mm512_maskz_mov_ps(LaneMask(g.bits, k, lane), LogisticOf(t, Exp2(MinusAbs(t))).p);
    };
    for (int k = 0; k < g.keys; k += 2) {
      const __m512 first = weight(k);
      const __m512 second = k + 1 < g.keys ? weight(k + 1) : _mm512_setzero_ps();
      StorePair(g.p + k / 2 * kLaneRow + 2 * lane, Pair(first, second));
    }
  }
  ClearPairs(g.p, (g.keys + 1) / 2 * 2);
}

struct GradientPair {
  __m512 p, ds;
};
template <bool kSigmoid>
inline GradientPair GradientAt(const Bf16Gradient& g, int row, int lane, __m512 lse, __m512 delta) {
  const int at = row * kLanes + lane;
  const __mmask16 seen = LaneMask(g.bits, row, lane);
  const __m512 t = _mm512_fmsub_ps(_mm512_load_ps(g.s + at), _mm512_set1_ps(g.scale), lse);
  if constexpr (kSigmoid) {
    const LogisticLanes weight = LogisticOf(t, Exp2(MinusAbs(t)));
    return {_mm512_maskz_mov_ps(seen, weight.p),
            _mm512_maskz_mul_ps(seen, weight.slope, _mm512_load_ps(g.dp + at))};
  } else {
    const __m512 p = _mm512_maskz_mov_ps(seen, Exp2(t));
    return {p, _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(g.dp + at), delta))};
  }
}

void GradientByQuery(const Bf16Gradient& g) {
  const GradientPair none = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int lane = 0; lane < kLanes; lane += kVector) {
    const __m512 lse = _mm512_load_ps(g.lse + lane), delta = _mm512_load_ps(g.delta + lane);
    for (int row = 0; row < g.rows; row += 2) {
      const GradientPair a = GradientAt<false>(g, row, lane, lse, delta);
      const GradientPair b =
          row + 1 < g.rows ? GradientAt<false>(g, row + 1, lane, lse, delta) : none;
      StorePair(g.ds + row / 2 * kLaneRow + 2 * lane, Pair(a.ds, b.ds));
    }
  }
  ClearPairs(g.ds, (g.rows + 1) / 2 * 2);
}

template <bool kSigmoid>
void GradientByKey(const Bf16Gradient& g) {
  for (int row = 0; row < g.rows; row += 2) {
    const bool pair = row + 1 < g.rows;
    const __m512 lse0 = _mm512_set1_ps(g.lse[row]), delta0 = _mm512_set1_ps(g.delta[row]);
    const __m512 lse1 = _mm512_set1_ps(pair ? g.lse[row + 1] : __builtin_inff());
    const __m512 delta1 = _mm512_set1_ps(pair ? g.delta[row + 1] : 0.0f);
    for (int lane = 0; lane < kLanes; lane += kVector) {
      const GradientPair a = GradientAt<kSigmoid>(g, row, lane, lse0, delta0);
      GradientPair b = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      if (pair) b = GradientAt<kSigmoid>(g, row + 1, lane, lse1, delta1);
      const int at = row / 2 * kLaneRow + 2 * lane;
      StorePair(g.p + at, Pair(a.p, b.p));
      StorePair(g.ds + at, Pair(a.ds, b.ds));
      if (g.ds_rows != nullptr) {
        StoreRow(g.ds_rows + row * kLanes + lane, a.ds);
        StoreRow(g.ds_rows + (row + 1) * kLanes + lane, b.ds);
      }
    }
  }
  ClearPairs(g.p, (g.rows + 1) / 2 * 2);
  ClearPairs(g.ds, (g.rows + 1) / 2 * 2);
  if (g.ds_rows != nullptr) ClearPairs(g.ds_rows, (g.rows + 1) / 2 * 2);
}

// ---- results ---------------------------------------------------------------------------------

void ScaleLanes(float* c, int rows, const float* scale) {
  for (int lane = 0; lane < kLanes; lane += kVector) {
    const __m512 by = _mm512_load_ps(scale + lane);
    for (int r = 0; r < rows; ++r) {
      float* at = c + r * kLanes + lane;
      _mm512_store_ps(at, _mm512_mul_ps(by, _mm512_load_ps(at)));
    }
  }
}

// Calls put(token, d, mask, values) for each 16 values d.. of each token.
template <class Put>
inline void ForEachRow(const LaneStore& g, Put put) {
  for (int t = 0; t < g.tokens; t += 16) {
    const __m512 scale = _mm512_load_ps(g.scale + t);
    for (int d = 0; d < g.dim; d += 16) {
      __m512i m[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        m[i] = d + i < g.dim ? _mm512_castps_si512(_mm512_mul_ps(
                                   scale, _mm512_load_ps(g.from + (d + i) * kLanes + t)))
                             : _mm512_setzero_si512();
      }
      Transpose16(m);
      const __mmask16 mask = FirstLanes(g.dim - d);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (t + i < g.tokens) put((t + i) * g.stride + d, mask, _mm512_castsi512_ps(m[i]));
      }
    }
  }
}

void StoreF32(const LaneStore& g, float* to) {
  ForEachRow(
      g, [to](int64_t at, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(to + at, mask, v); });
}

void StoreBf16(const LaneStore& g, uint16_t* to) {
  ForEachRow(g, [to](int64_t at, __mmask16 mask, __m512 v) {
    _mm256_mask_storeu_epi16(to + at, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  });
}

void AddF32(const LaneStore& g, float* to) {
  ForEachRow(g, [to](int64_t at, __mmask16 mask, __m512 v) {
    const __m512 sum = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to + at));
    _mm512_mask_storeu_ps(to + at, mask, sum);
  });
}

void NoTask() {}

}  // namespace

const Bf16Kernels kKernels = {NoTask,
                              NoTask,
                              Gemm,
                              CopyRows,
                              RoundRows,
                              ToColumns,
                              ToLanes,
                              Softmax,
                              GradientByQuery,
                              GradientByKey<false>,
                              Sigmoid,
                              GradientByKey<true>,
                              ScaleLanes,
                              StoreF32,
                              StoreBf16,
                              AddF32};

}  // namespace longspan::ops::avx512_bf16
