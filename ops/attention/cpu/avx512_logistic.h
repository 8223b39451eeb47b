#pragma once
// For files compiled for AVX-512, under the rules at their heads; nothing in others.
#if defined(__AVX512DQ__)
#include <immintrin.h>

namespace longspan::ops {
namespace {

// logistic.h on 16 lanes.
struct LogisticLanes {
  __m512 p, slope;
};

inline __m512 MinusAbs(__m512 t) { return _mm512_or_ps(t, _mm512_set1_ps(-0.0f)); }

inline LogisticLanes LogisticOf(__m512 t, __m512 e) {
  const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), e);
  // 1 / d to 1 ulp: an estimate of 14 bits and a step of Newton's method.
  const __m512 guess = _mm512_rcp14_ps(d);
  const __m512 error = _mm512_fnmadd_ps(d, guess, _mm512_set1_ps(1.0f));
  const __m512 r = _mm512_fmadd_ps(guess, error, guess);
  const __m512 er = _mm512_mul_ps(e, r);
  const __mmask16 negative = _mm512_cmp_ps_mask(t, _mm512_setzero_ps(), _CMP_LT_OQ);
  return {_mm512_mask_mov_ps(r, negative, er), _mm512_mul_ps(er, r)};
}

}  // namespace
}  // namespace longspan::ops
#endif
