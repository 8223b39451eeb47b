#pragma once
#include "ops/elementwise/cpu/lanes.h"

// Functions of vectors, written over any number of them: see Twice.
namespace longspan::ops::LONGSPAN_ROW_SET {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr auto kLog2EHigh = static_cast<float>(kLog2E);
constexpr auto kLog2ELow = static_cast<float>(kLog2E - static_cast<double>(kLog2EHigh));

#if defined(__AVX512F__)
constexpr double kRound32nds = 393216;  // 1.5 * 2^18: adding it rounds to 32nds

// The bits of 2^(j / 32) less j 2^18: so that the sum below carries the 32nds away.
alignas(64) constexpr int32_t kPowers[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

// 2^n for n = shifted - kRound32nds from -126 to 127: the last five bits of `shifted` are the
// 32nds, those above them belong into the exponent.
inline Lanes PowerOfTwo(Lanes shifted) {
  const __m512i n = __m512i(shifted.v);
  const __m512i power =
      _mm512_permutex2var_epi32(_mm512_load_si512(kPowers), n, _mm512_load_si512(kPowers + 16));
  return FloatVector(_mm512_add_epi32(power, _mm512_slli_epi32(n, 18)));
}
template <class V>
inline Twice<V> PowerOfTwo(Twice<V> shifted) {
  return {PowerOfTwo(shifted.low), PowerOfTwo(shifted.high)};
}
inline Lanes RoughReciprocal(Lanes x) { return FloatVector(_mm512_rcp14_ps(x.v)); }
template <class V>
inline Twice<V> RoughReciprocal(Twice<V> x) {
  return {RoughReciprocal(x.low), RoughReciprocal(x.high)};
}

// 2^(n + r) for n = shifted - kRound32nds and |r| <= 1/64: for 2^r a quadratic that goes through 1
// is off by 5e-8 at most.
template <class V>
inline V PowerOfTwo(V shifted, V r) {
  const V power = PowerOfTwo(shifted);
  return MultiplyAdd(power * r, MultiplyAdd(V(0.24022651), r, V(0.69315734)), power);
}

// 1 / x to 1 ulp for finite x other than 0.
template <Vectors V>
inline V Reciprocal(V x) {
  const V guess = RoughReciprocal(x);
  return MultiplyAdd(guess, MultiplyAdd(-x, guess, V(1)), guess);
}

// As Exp of a float (elementwise/exp.h); below -87.33 at most 1.2e-38.
template <Vectors V>
inline V Exp(V x) {
  const V clamped = Min(V(88.37f), Max(V(-87.33f), x));
  const V shifted = MultiplyAdd(clamped, V(kLog2EHigh), V(kRound32nds));
  const V n = shifted - V(kRound32nds);
  return PowerOfTwo(shifted,
                    MultiplyAdd(clamped, V(kLog2ELow), MultiplyAdd(clamped, V(kLog2EHigh), -n)));
}

// As SigmoidBase2 of a float.
template <Vectors V>
inline V SigmoidBase2(V x) {
  const V shifted = V(kRound32nds) - x, n = shifted - V(kRound32nds);
  return Reciprocal(V(1) + PowerOfTwo(shifted, -x - n));
}

#else

template <Vectors V>
inline V Reciprocal(V x) {
  return V(1) / x;
}

// p 2^n for n = shifted - 1.5 * 2^23, and 0 where x is below -87.33.
inline Lanes ScaledPower(Lanes p, Lanes shifted, Lanes x) {
  const IntVector scale = (reinterpret_cast<IntVector>(shifted.v) << 23) + 0x3f800000;
  const FloatVector e = p.v * reinterpret_cast<FloatVector>(scale);
  return x.v < FloatVector{} - 87.33f ? FloatVector{} : e;
}
template <class V>
inline Twice<V> ScaledPower(Twice<V> p, Twice<V> shifted, Twice<V> x) {
  return {ScaledPower(p.low, shifted.low, x.low), ScaledPower(p.high, shifted.high, x.high)};
}

// As Exp of a float (elementwise/exp.h).
template <Vectors V>
inline V Exp(V x) {
  constexpr double kRound = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  const V clamped = Min(V(88.37f), Max(V(-104), x));
  const V shifted = MultiplyAdd(clamped, V(kLog2E), V(kRound));
  const V n = shifted - V(kRound);
  // ln 2 in two parts; the first has few bits, so that n * part is exact.
  const V r = MultiplyAdd(n, V(2.12194440e-4f), MultiplyAdd(n, V(-0.693359375f), clamped));
  // The series to r^7 in pairs of terms: half the length of a chain.
  const V r2 = r * r;
  const V low = MultiplyAdd(MultiplyAdd(r, V(1.0f / 6), V(0.5f)), r2, r + V(1));
  const V high = MultiplyAdd(MultiplyAdd(r, V(1.0f / 5040), V(1.0f / 720)), r2,
                             MultiplyAdd(r, V(1.0f / 120), V(1.0f / 24)));
  return ScaledPower(MultiplyAdd(high, r2 * r2, low), shifted, x);
}

template <Vectors V>
inline V SigmoidBase2(V x) {
  return Reciprocal(V(1) + Exp(x * V(-0.6931471805599453)));
}

#endif

template <Vectors V>
inline V Sigmoid(V x) {
  return Reciprocal(V(1) + Exp(-x));
}

}  // namespace
}  // namespace longspan::ops::LONGSPAN_ROW_SET
