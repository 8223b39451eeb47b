#pragma once
#if defined(__SSE2__)
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
  static constexpr int64_t kCount = kWidth;
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

// Twice as many, computed with in turns: the chains of operations of a long formula overlap, where
// one chain alone leaves the processor waiting for its own results.
template <class V>
struct Twice {
  static constexpr int64_t kCount = 2 * V::kCount;
  V low, high;
  Twice() = default;
  Twice(V first, V second) : low(first), high(second) {}
  Twice(Lanes all) : low(all), high(all) {}  // NOLINT: the same for every vector
  explicit Twice(double all) : low(all), high(all) {}

  friend Twice operator+(Twice a, Twice b) { return {a.low + b.low, a.high + b.high}; }
  friend Twice operator-(Twice a, Twice b) { return {a.low - b.low, a.high - b.high}; }
  friend Twice operator*(Twice a, Twice b) { return {a.low * b.low, a.high * b.high}; }
  friend Twice operator/(Twice a, Twice b) { return {a.low / b.low, a.high / b.high}; }
  friend Twice operator-(Twice a) { return {-a.low, -a.high}; }
};

// Lanes, or Twice of it or of that.
template <class V>
concept Vectors = requires {
  V::kCount;
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
template <class V>
inline Twice<V> Min(Twice<V> a, Twice<V> b) {
  return {Min(a.low, b.low), Min(a.high, b.high)};
}
template <class V>
inline Twice<V> Max(Twice<V> a, Twice<V> b) {
  return {Max(a.low, b.low), Max(a.high, b.high)};
}

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
template <class V>
inline Twice<V> MultiplyAdd(Twice<V> a, Twice<V> b, Twice<V> c) {
  return {MultiplyAdd(a.low, b.low, c.low), MultiplyAdd(a.high, b.high, c.high)};
}

inline Lanes Load(const float* p) {
  Lanes x;
  __builtin_memcpy(&x.v, p, sizeof x.v);
  return x;
}
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

// x as it is stored at a pointer of this type, rounded as BF16 of a float is.
inline FloatVector Rounded(const float*, Lanes x) { return x.v; }
inline ShortVector Rounded(const BF16*, Lanes x) {
  const auto bits = reinterpret_cast<UintVector>(x.v);
  const UintVector even = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
  const UintVector wide = x.v != x.v ? (bits >> 16) | 0x40 : even;
#if defined(__AVX512F__)
  return ShortVector(_mm512_cvtepi32_epi16(__m512i(wide)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(__m256i(wide), __m256i(wide));
  return ShortVector(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#else
  return __builtin_convertvector(wide, ShortVector);
#endif
}

// The same for results of long formulas, with the instruction that rounds where there is one. It
// takes what is below 2^-126 for 0.
inline FloatVector RoundedNormal(const float*, Lanes x) { return x.v; }
inline ShortVector RoundedNormal(const BF16* p, Lanes x) {
#if defined(__AVX512BF16__)
  (void)p;
  return ShortVector(_mm512_cvtneps_pbh(x.v));
#else
  return Rounded(p, x);
#endif
}

// Writes a vector past the caches: a plain store to a line that is not there reads it first. `p`
// begins a vector of its line; StreamFence() makes such writes visible to other threads.
#if defined(__SSE2__)
constexpr bool kStreams = true;
inline void StreamFence() { _mm_sfence(); }
#if defined(__AVX512F__)
inline void StreamBits(void* p, FloatVector x) { _mm512_stream_ps(static_cast<float*>(p), x); }
inline void StreamBits(void* p, ShortVector x) {
  _mm256_stream_si256(static_cast<__m256i*>(p), __m256i(x));
}
#elif defined(__AVX2__)
inline void StreamBits(void* p, FloatVector x) { _mm256_stream_ps(static_cast<float*>(p), x); }
inline void StreamBits(void* p, ShortVector x) {
  _mm_stream_si128(static_cast<__m128i*>(p), __m128i(x));
}
#else
inline void StreamBits(void* p, FloatVector x) { _mm_stream_ps(static_cast<float*>(p), x); }
inline void StreamBits(void* p, ShortVector x) {
  long long bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  _mm_stream_si64(static_cast<long long*>(p), bits);
}
#endif
#else
constexpr bool kStreams = false;
inline void StreamFence() {}
template <class Bits>
inline void StreamBits(void* p, Bits x) {
  __builtin_memcpy(p, &x, sizeof x);
}
#endif

template <bool kStream, class Bits>
inline void WriteBits(void* p, Bits x) {
  if constexpr (kStream) {
    StreamBits(p, x);
  } else {
    __builtin_memcpy(p, &x, sizeof x);
  }
}
template <class T>
inline void Store(T* p, Lanes x) {
  WriteBits<false>(p, Rounded(p, x));
}

// f64 has no vectors here: it is for exact tests.
inline double Load(const double* p) { return *p; }
inline void Store(double* p, double x) { *p = x; }
inline void Store(BF16* p, double x) { *p = BF16(static_cast<float>(x)); }
using internal::Exp;
using internal::Max;
using internal::Min;

// Vectors that a loop over elements of T takes at a time, and one. With 32 registers four chains
// find room for what they need, with 16 two; twice as many where each needs little.
template <class T>
struct LanesOf {
  using Type = Lanes;
#if defined(__AVX512F__)
  using Deep = Twice<Twice<Lanes>>;
#else
  using Deep = Twice<Lanes>;
#endif
  using Deepest = Twice<Deep>;
};
template <>
struct LanesOf<double> {
  using Type = double;
  using Deep = double;
  using Deepest = double;
};
template <class V>
constexpr int64_t CountOf() {
  if constexpr (Vectors<V>) {
    return V::kCount;
  } else {
    return 1;
  }
}

template <class V, class T>
inline V LoadAs(const T* p) {
  if constexpr (CountOf<V>() <= kWidth) {
    return Load(p);
  } else {
    using Half = decltype(V::low);
    return {LoadAs<Half>(p), LoadAs<Half>(p + Half::kCount)};
  }
}

// Two vectors at a time where an instruction rounds two.
template <bool kStream>
inline void WriteNormal(BF16* p, Twice<Lanes> x) {
#if defined(__AVX512BF16__)
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.high.v, x.low.v));
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
  } else {
    _mm512_storeu_si512(p, both);
  }
#else
  WriteBits<kStream>(p, RoundedNormal(p, x.low));
  WriteBits<kStream>(p + kWidth, RoundedNormal(p, x.high));
#endif
}

// Writes x; `kNormal` by RoundedNormal.
template <bool kStream, bool kNormal, class T, class V>
inline void Write(T* p, V x) {
  if constexpr (std::is_same_v<V, double>) {
    Store(p, x);
  } else if constexpr (std::is_same_v<V, Lanes>) {
    WriteBits<kStream>(p, kNormal ? RoundedNormal(p, x) : Rounded(p, x));
  } else if constexpr (kNormal && std::is_same_v<V, Twice<Lanes>> && std::is_same_v<T, BF16>) {
    WriteNormal<kStream>(p, x);
  } else {
    Write<kStream, kNormal>(p, x.low);
    Write<kStream, kNormal>(p + decltype(V::low)::kCount, x.high);
  }
}

// As many elements as V has, bit for bit.
template <bool kStream, class V, class T>
inline void Copy(T* to, const T* from) {
  if constexpr (std::is_same_v<T, double>) {
    *to = *from;
  } else {
    for (int64_t i = 0; i < CountOf<V>(); i += kWidth) {
      decltype(Rounded(from, Lanes())) bits;
      __builtin_memcpy(&bits, static_cast<const void*>(from + i), sizeof bits);
      WriteBits<kStream>(to + i, bits);
    }
  }
}

}  // namespace
}  // namespace longspan::ops::LONGSPAN_ROW_SET
