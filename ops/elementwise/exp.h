#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "ops/core/device_code.h"

// Functions of host and device that files compiled for an instruction set use too. Always inlined:
// of a copy the linker could give one for a newer processor to code that runs on an older one.
#define LONGSPAN_HD_INLINE LONGSPAN_HD __attribute__((always_inline)) inline

namespace longspan::ops::internal {

// e^x for loops that the compiler should vectorise (the library's expf is one call an element on a
// host; on a GPU it is a few instructions and one in hardware).
// f32: relative error below 2.4e-7 on [-87, 88]; below -87.33 the result is 0 (on a GPU less than
// 2^-126), above 88.37 it stays at 2.4e38 instead of becoming infinite; NaN gives NaN.
// f64: std::exp.
LONGSPAN_HD_INLINE float Exp(float x) {
  constexpr float kHigh = 88.37f;  // 2^127
#ifdef __CUDA_ARCH__
  return expf(x > kHigh ? kHigh : x);
#else
  constexpr float kLow = -87.33f;        // 2^-126
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float clamped = x < kLow ? kLow : x;
  clamped = clamped > kHigh ? kHigh : clamped;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  // ln 2 in two parts; the first has few bits, so that n * part is exact.
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  // Taylor series to r^7 on |r| <= ln(2) / 2: the first term left out is below 6e-9.
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < kLow ? 0.0f : p * scale;
#endif
}
LONGSPAN_HD_INLINE double Exp(double x) { return std::exp(x); }

// The one of two that is smaller or larger; b where one is NaN.
template <class Real>
LONGSPAN_HD_INLINE Real Min(Real a, Real b) {
  return a < b ? a : b;
}
template <class Real>
LONGSPAN_HD_INLINE Real Max(Real a, Real b) {
  return a > b ? a : b;
}

// a b + c, which vectors (cpu/lanes.h) round once where their instruction set can.
template <class Real>
LONGSPAN_HD_INLINE Real MultiplyAdd(Real a, Real b, Real c) {
  return a * b + c;
}

// 1 / (1 + e^-x). On a GPU in f32 by the division of 2 ulp, which makes 0 of what is below 2^-126.
template <class Real>
LONGSPAN_HD_INLINE Real Sigmoid(Real x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<Real, float>) return __fdividef(1.0f, 1.0f + Exp(-x));
#endif
  return Real(1) / (Real(1) + Exp(-x));
}

// 1 / (1 + 2^-x) for x of at most 126 in magnitude.
template <class Real>
LONGSPAN_HD_INLINE Real SigmoidBase2(Real x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<Real, float>) return __fdividef(1.0f, 1.0f + exp2f(-x));
#endif
  return Sigmoid(x * Real(0.6931471805599453));
}

}  // namespace longspan::ops::internal
