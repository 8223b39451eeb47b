#pragma once
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#include <stdint.h>

#include "ops/core/dtype.h"
#include "ops/elementwise/exp.h"

// Vectors of the width that the instruction set of this file has, for row_loops.h.
#ifndef LONGSPAN_ROW_SET
#define LONGSPAN_ROW_SET portable
#endif

namespace longspan::ops::LONGSPAN_ROW_SET {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif
using FloatVector = float __attribute__((vector_size(4 * kWidth)));
using IntVector = int32_t __attribute__((vector_size(4 * kWidth)));
using UintVector = uint32_t __attribute__((vector_size(4 * kWidth)));
using ShortVector = uint16_t __attribute__((vector_size(2 * kWidth)));

// kWidth floats that the formulas of the ops (activation/formulas.h) compute with like one.
struct Lanes {
  FloatVector v;
  Lanes() = default;
  Lanes(FloatVector value) : v(value) {}  // NOLINT: a wrapper
  explicit Lanes(double all) : v(FloatVector{} + static_cast<float>(all)) {}

  friend Lanes operator+(Lanes a, Lanes b) { return a.v + b.v; }
  friend Lanes operator-(Lanes a, Lanes b) { return a.v - b.v; }
  friend Lanes operator*(Lanes a, Lanes b) { return a.v * b.v; }
  friend Lanes operator/(Lanes a, Lanes b) { return a.v / b.v; }
  friend Lanes operator-(Lanes a) { return -a.v; }
};

// The one that is smaller or larger; b where one is NaN.
#if defined(__AVX512F__)
inline Lanes Min(Lanes a, Lanes b) { return FloatVector(_mm512_min_ps(a.v, b.v)); }
inline Lanes Max(Lanes a, Lanes b) { return FloatVector(_mm512_max_ps(a.v, b.v)); }
#elif defined(__AVX2__)
inline Lanes Min(Lanes a, Lanes b) { return FloatVector(_mm256_min_ps(a.v, b.v)); }
inline Lanes Max(Lanes a, Lanes b) { return FloatVector(_mm256_max_ps(a.v, b.v)); }
#else
inline Lanes Min(Lanes a, Lanes b) { return a.v < b.v ? a.v : b.v; }
inline Lanes Max(Lanes a, Lanes b) { return a.v > b.v ? a.v : b.v; }
#endif

// a b + c, rounded once where the instruction set can.
inline Lanes MultiplyAdd(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return FloatVector(_mm512_fmadd_ps(a.v, b.v, c.v));
#elif defined(__FMA__)
  return FloatVector(_mm256_fmadd_ps(a.v, b.v, c.v));
#else
  return a * b + c;
#endif
}

// 1 / x to 1 ulp for finite x other than 0.
inline Lanes Reciprocal(Lanes x) {
#if defined(__AVX512F__)
  const Lanes guess = FloatVector(_mm512_rcp14_ps(x.v));
  return MultiplyAdd(guess, FloatVector(_mm512_fnmadd_ps(x.v, guess.v, Lanes(1).v)), guess);
#else
  return Lanes(1) / x;
#endif
}

// As Exp of a float (elementwise/exp.h); below -87.33 less than 2^-126.
inline Lanes Exp(Lanes x) {
  constexpr double kRound = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes clamped = Min(Lanes(88.37f), Max(Lanes(-104), x));
  const Lanes shifted = MultiplyAdd(clamped, Lanes(1.44269504f), Lanes(kRound));
  const Lanes n = shifted - Lanes(kRound);
  // ln 2 in two parts; the first has few bits, so that n * part is exact.
  const Lanes r =
      MultiplyAdd(n, Lanes(2.12194440e-4f), MultiplyAdd(n, Lanes(-0.693359375f), clamped));
  // The series to r^7 in pairs of terms: half the length of a chain, which is what takes the time.
  const Lanes r2 = r * r;
  const Lanes low = MultiplyAdd(MultiplyAdd(r, Lanes(1.0f / 6), Lanes(0.5f)), r2, r + Lanes(1));
  const Lanes high = MultiplyAdd(MultiplyAdd(r, Lanes(1.0f / 5040), Lanes(1.0f / 720)), r2,
                                 MultiplyAdd(r, Lanes(1.0f / 120), Lanes(1.0f / 24)));
  const Lanes p = MultiplyAdd(high, r2 * r2, low);
#if defined(__AVX512F__)
  return FloatVector(_mm512_scalef_ps(p.v, n.v));
#else
  const IntVector scale = (reinterpret_cast<IntVector>(shifted.v) << 23) + 0x3f800000;
  const FloatVector e = p.v * reinterpret_cast<FloatVector>(scale);
  return x.v < FloatVector{} - 87.33f ? FloatVector{} : e;
#endif
}

inline Lanes Sigmoid(Lanes x) { return Reciprocal(Lanes(1) + Exp(-x)); }

inline Lanes Load(const float* p) {
  Lanes x;
  __builtin_memcpy(&x.v, p, sizeof x.v);
  return x;
}
inline void Store(float* p, Lanes x) { __builtin_memcpy(p, &x.v, sizeof x.v); }

inline Lanes Load(const BF16* p) {
  ShortVector half;
  __builtin_memcpy(&half, &p->bits, sizeof half);
#if defined(__AVX512F__)
  const auto wide = UintVector(_mm512_cvtepu16_epi32(__m256i(half)));
#elif defined(__AVX2__)
  const auto wide = UintVector(_mm256_cvtepu16_epi32(__m128i(half)));
#else
  const UintVector wide = __builtin_convertvector(half, UintVector);
#endif
  return reinterpret_cast<FloatVector>(wide << 16);
}

// Rounded as BF16 of a float is.
inline void Store(BF16* p, Lanes x) {
  const auto bits = reinterpret_cast<UintVector>(x.v);
  const UintVector even = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
  const UintVector wide = x.v != x.v ? (bits >> 16) | 0x40 : even;
#if defined(__AVX512F__)
  const auto half = ShortVector(_mm512_cvtepi32_epi16(__m512i(wide)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(__m256i(wide), __m256i(wide));
  const auto half = ShortVector(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#else
  const ShortVector half = __builtin_convertvector(wide, ShortVector);
#endif
  __builtin_memcpy(&p->bits, &half, sizeof half);
}

// f64 has no vectors here: it is for exact tests.
inline double Load(const double* p) { return *p; }
inline void Store(double* p, double x) { *p = x; }
inline void Store(BF16* p, double x) { *p = BF16(static_cast<float>(x)); }
using internal::Exp;
using internal::Max;
using internal::Min;

// Store for results of long formulas, with the instruction that rounds where there is one. It
// takes what is below 2^-126 for 0.
template <class T, class V>
inline void StoreNormal(T* p, V x) {
  Store(p, x);
}
#if defined(__AVX512BF16__)
inline void StoreNormal(BF16* p, Lanes x) {
  const auto half = ShortVector(_mm512_cvtneps_pbh(x.v));
  __builtin_memcpy(&p->bits, &half, sizeof half);
}
#endif

template <class T>
struct LanesOf {
  using Type = Lanes;
  static constexpr int64_t kCount = kWidth;
};
template <>
struct LanesOf<double> {
  using Type = double;
  static constexpr int64_t kCount = 1;
};

}  // namespace
}  // namespace longspan::ops::LONGSPAN_ROW_SET
