#pragma once
#include "ops/attention/cuda/mma_tile.cuh"
#include "ops/attention/logistic.h"

// How the rows of a warp make weights of scores, and what becomes of the output at the end.
namespace longspan::ops::mma {

struct RowResult {
  float factor;  // for the row's output
  float lse;     // natural log; of softmax
};

// Online softmax of the rows of a warp. Scores are those before the scale, which is positive here.
template <int kM>
struct SoftmaxRows {
  // Of rows 16 m + g and + 8. The maximum is that of the scaled scores as it was rounded, so that
  // one that stays leaves what was summed alone. Of the four lanes of a row, each even one sums its
  // own and its neighbour's weights, for lse; the odd ones sum all weights of the row rounded as
  // the product with V takes them, by which the output is divided.
  float maximum[kM][2], sum[kM][2];

  __device__ SoftmaxRows() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      maximum[m][0] = maximum[m][1] = kMinusInfinity;
      sum[m][0] = sum[m][1] = 0;
    }
  }

  // s becomes exp2(scale * s - maximum); `o` and the sums follow the new maxima. A row that has
  // seen nothing keeps maximum -inf, and 0 stands for it in the exponent. A NaN is no maximum but
  // reaches the sums.
  template <int kN, int kO>
  __device__ __forceinline__ void Step(Accumulator<kM, kN>& s, Accumulator<kM, kO>& o, float scale,
                                       float /*bias*/) {
    float rescale[kM][2];
    bool raised = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = kMinusInfinity;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          top = fmaxf(top, fmaxf(s.at[m][n][2 * r], s.at[m][n][2 * r + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(maximum[m][r], top * scale);
        const float shift = top == kMinusInfinity ? 0.0f : top;
        rescale[m][r] = cuda::ptx::Exp2(maximum[m][r] - shift);  // 1 where the maximum stays
        raised |= rescale[m][r] != 1.0f;
        maximum[m][r] = top;
        float total = 0;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            s.at[m][n][e] = cuda::ptx::Exp2(fmaf(s.at[m][n][e], scale, -shift));
            total += s.at[m][n][e];
          }
        }
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        const float before = sum[m][r] * rescale[m][r];
        sum[m][r] = HoldsRounded() ? before : before + total;
      }
    }
    if (!__any_sync(0xffffffffu, raised)) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kO; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o.at[m][n][e] *= rescale[m][e / 2];
      }
    }
  }

  // The rounded weights of a step join the sums. As a product with ones, whose columns are all the
  // same, it takes no registers that outlive it.
  template <int kInner>
  __device__ __forceinline__ void Count(const Weights<kM, kInner>& w) {
    constexpr uint32_t kOnes = 0x3f803f80;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float total[4] = {};
#pragma unroll
      for (int k = 0; k < kInner; ++k) cuda::ptx::MmaBf16(total, w.at[m][k], kOnes, kOnes);
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[m][r] += HoldsRounded() ? total[2 * r] : 0.0f;
    }
  }

  // Whole warps.
  __device__ RowResult Finish(int m, int r) const {
    const float next = __shfl_xor_sync(0xffffffffu, sum[m][r], 1);
    const float rounded = HoldsRounded() ? sum[m][r] : next;
    float total = HoldsRounded() ? next : sum[m][r];
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    // Scores of NaN alone have no maximum either, but a sum.
    if (maximum[m][r] == kMinusInfinity && total == 0) return {0, kMinusInfinity};
    const double top = maximum[m][r];  // in units of log2
    return {1.0f / rounded, static_cast<float>(kLn2 * top) + logf(total)};
  }

 private:
  __device__ static bool HoldsRounded() { return threadIdx.x % 2 != 0; }
};

// Sigmoid: each weight by itself.
template <int kM>
struct SigmoidRows {
  // s becomes 1 / (1 + exp2(-scale * s - bias)); -inf becomes 0, a NaN stays.
  template <int kN, int kO>
  __device__ __forceinline__ void Step(Accumulator<kM, kN>& s, Accumulator<kM, kO>&, float scale,
                                       float bias) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (float& x : s.at[m][n]) {
          x = cuda::ptx::Reciprocal(1 + cuda::ptx::Exp2(fmaf(x, -scale, -bias)));
        }
      }
    }
  }
  template <int kInner>
  __device__ void Count(const Weights<kM, kInner>&) const {}
  __device__ RowResult Finish(int, int) const { return {1, 0}; }
};

// The weight of a score of sigmoid in units of log2, and its slope.
__device__ __forceinline__ Logistic<float> SigmoidWeight(float t) {
  const float e = cuda::ptx::Exp2(-fabsf(t));
  return LogisticOf(t, e, cuda::ptx::Reciprocal(1 + e));
}

}  // namespace longspan::ops::mma
