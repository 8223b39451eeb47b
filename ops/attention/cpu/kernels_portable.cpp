#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "ops/attention/cpu/block_kernels.h"
#include "ops/attention/logistic.h"
#include "ops/core/dtype.h"

// Plain loops over fixed numbers of lanes, which compilers turn into vector code for any processor.
namespace longspan::ops::portable {
namespace {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class From, class Convert>
void Pack(const From* from, int64_t stride, int rows, int columns, int padded, float* to,
          int64_t ld, Convert convert) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) to[r * ld + c] = convert(from[r * stride + c]);
    std::fill(to + r * ld + columns, to + r * ld + padded, 0.0f);
  }
}

void PackF32(const float* from, int64_t stride, int rows, int columns, int padded, float* to,
             int64_t ld) {
  Pack(from, stride, rows, columns, padded, to, ld, [](float x) { return x; });
}

void PackBf16(const uint16_t* from, int64_t stride, int rows, int columns, int padded, float* to,
              int64_t ld) {
  Pack(from, stride, rows, columns, padded, to, ld,
       [](uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); });
}

void Transpose(const float* from, int64_t ld, int rows, int columns, float* to) {
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < rows; ++r) to[c * 64 + r] = from[r * ld + c];
    std::fill(to + c * 64 + rows, to + (c + 1) * 64, 0.0f);
  }
}

// Four floats that the compiler keeps in one vector register (SSE, NEON, ...).
using Vec4 = float __attribute__((vector_size(16), may_alias));
constexpr int kTileColumns = 8;  // two vectors

// kRows x 8 of the product stays in registers over the whole inner sum.
template <int kRows>
void Tile(const BlockGemm& g, int row, int column) {
  Vec4 sum[kRows][2] = {};
  const float* a = g.a + row * g.a_row;
  const float* b = g.b + column;
  for (int t = 0; t < g.inner; ++t) {
    const Vec4 b0 = *reinterpret_cast<const Vec4*>(b), b1 = *reinterpret_cast<const Vec4*>(b + 4);
    for (int r = 0; r < kRows; ++r) {
      const float x = a[r * g.a_row];
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
    a += g.a_inner;
    b += g.ldb;
  }
  for (int r = 0; r < kRows; ++r) {
    Vec4* c = reinterpret_cast<Vec4*>(g.c + (row + r) * g.ldc + column);
    for (int n = 0; n < 2; ++n) {
      if (g.row_scale != nullptr) sum[r][n] += g.row_scale[row + r] * c[n];
      c[n] = sum[r][n];
    }
  }
}

void Gemm(const BlockGemm& g) {
  for (int column = 0; column < g.columns; column += kTileColumns) {
    int row = 0;
    for (; row + 4 <= g.rows; row += 4) Tile<4>(g, row, column);
    for (; row < g.rows; ++row) Tile<1>(g, row, column);
  }
}

// 2^t for t <= 127; 0 below -126; NaN stays NaN. See kernels_avx512.cpp for the polynomial.
float Exp2(float t) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const float clamped = t < -126.0f ? -126.0f : t;
  const float shifted = clamped + kRound;
  const float x = clamped - (shifted - kRound);
  float p = 0x1.41d334p-13f;
  p = p * x + 0x1.5f456ap-10f;
  p = p * x + 0x1.3b2dbcp-7f;
  p = p * x + 0x1.c6aed4p-5f;
  p = p * x + 0x1.ebfbdap-3f;
  p = p * x + 0x1.62e430p-1f;
  p = p * x + 1.0f;
  const uint32_t whole = std::bit_cast<uint32_t>(shifted) << 23;
  const float power = std::bit_cast<float>(whole + 0x3f800000u);
  return t < -126.0f ? 0.0f : p * power;
}

// Zeroes or replaces the lanes [first, first + n) of `row` that are not visible.
void Hide(const uint64_t* bits, int row, int first, int n, float replacement, float* values) {
  if (bits == nullptr) return;
  for (int i = 0; i < n; ++i) {
    if ((bits[row] >> (first + i) & 1) == 0) values[i] = replacement;
  }
}

void Softmax(const SoftmaxStep& step) {
  for (int first = 0; first < 64; first += kLanes) {
    float top[kLanes], shift[kLanes], sum[kLanes];
    for (int n = 0; n < kLanes; ++n) top[n] = step.maximum[first + n];
    for (int k = 0; k < step.keys; ++k) {
      float* s = step.s + k * 64 + first;
      for (int n = 0; n < kLanes; ++n) s[n] *= step.scale;
      Hide(step.bits, k, first, kLanes, -kInfinity, s);
      for (int n = 0; n < kLanes; ++n) top[n] = top[n] < s[n] ? s[n] : top[n];
    }
    for (int n = 0; n < kLanes; ++n) {
      // A lane without any visible key subtracts 0, so that -inf - -inf never happens.
      shift[n] = top[n] == -kInfinity ? 0.0f : top[n];
      const float rescale = Exp2(step.maximum[first + n] - shift[n]);
      step.maximum[first + n] = top[n];
      step.rescale[first + n] = rescale;
      sum[n] = 0;  // of this block: small terms would be lost one by one in the sum of a long row
    }
    for (int k = 0; k < step.keys; ++k) {
      float* s = step.s + k * 64 + first;
      for (int n = 0; n < kLanes; ++n) {
        s[n] = Exp2(s[n] - shift[n]);
        sum[n] += s[n];
      }
    }
    for (int n = 0; n < kLanes; ++n) {
      step.sum[first + n] = step.sum[first + n] * step.rescale[first + n] + sum[n];
    }
  }
}

void GradientByQuery(const GradientStep& step) {
  for (int k = 0; k < step.rows; ++k) {
    float* s = step.s + k * 64;
    float* dp = step.dp + k * 64;
    for (int n = 0; n < 64; ++n) s[n] = Exp2(s[n] * step.scale - step.lse[n]);
    Hide(step.bits, k, 0, 64, 0.0f, s);
    for (int n = 0; n < 64; ++n) dp[n] = s[n] * (dp[n] - step.delta[n]);
  }
}

void GradientByKey(const GradientStep& step) {
  for (int q = 0; q < step.rows; ++q) {
    float* s = step.s + q * 64;
    float* dp = step.dp + q * 64;
    const float lse = step.lse[q], delta = step.delta[q];
    for (int n = 0; n < 64; ++n) s[n] = Exp2(s[n] * step.scale - lse);
    Hide(step.bits, q, 0, 64, 0.0f, s);
    for (int n = 0; n < 64; ++n) dp[n] = s[n] * (dp[n] - delta);
  }
}

void Sigmoid(const SigmoidStep& step) {
  for (int k = 0; k < step.keys; ++k) {
    float* s = step.s + k * 64;
    for (int n = 0; n < 64; ++n) {
      const float t = s[n] * step.scale + step.bias;
      s[n] = LogisticOf(t, Exp2(-std::abs(t))).p;
    }
    Hide(step.bits, k, 0, 64, 0.0f, s);
  }
}

// Of one row, with the `lse` of each lane.
void SigmoidGradientRow(const GradientStep& step, int row, const float* lse) {
  float* s = step.s + row * 64;
  float* dp = step.dp + row * 64;
  for (int n = 0; n < 64; ++n) {
    const float t = s[n] * step.scale - lse[n];
    const Logistic<float> weight = LogisticOf(t, Exp2(-std::abs(t)));
    s[n] = weight.p;
    dp[n] *= weight.slope;
  }
  Hide(step.bits, row, 0, 64, 0.0f, s);
  Hide(step.bits, row, 0, 64, 0.0f, dp);
}

void SigmoidGradientByQuery(const GradientStep& step) {
  for (int k = 0; k < step.rows; ++k) SigmoidGradientRow(step, k, step.lse);
}

void SigmoidGradientByKey(const GradientStep& step) {
  float lse[64];
  for (int q = 0; q < step.rows; ++q) {
    std::fill(lse, lse + 64, step.lse[q]);
    SigmoidGradientRow(step, q, lse);
  }
}

}  // namespace

const BlockKernels kBlockKernels = {PackF32,
                                    PackBf16,
                                    Transpose,
                                    Gemm,
                                    Softmax,
                                    GradientByQuery,
                                    GradientByKey,
                                    Sigmoid,
                                    SigmoidGradientByQuery,
                                    SigmoidGradientByKey};

}  // namespace longspan::ops::portable
