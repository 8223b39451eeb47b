#include <immintrin.h>

#include "ops/core/cpu/peak_kernels.h"

namespace longspan::avx512 {

float FmaLoop(long iterations) {
  __m512 a[24];
  for (int i = 0; i < 24; ++i) a[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(1e-3f);
  for (long n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) a[i] = _mm512_fmadd_ps(a[i], x, y);
  }
  __m512 sum = a[0];
  for (int i = 1; i < 24; ++i) sum = _mm512_add_ps(sum, a[i]);
  float lanes[16], total = 0;
  _mm512_storeu_ps(lanes, sum);
  for (float lane : lanes) total += lane;
  return total;
}

}  // namespace longspan::avx512
