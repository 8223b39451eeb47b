#pragma once
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <vector>

#include "ops/core/context.h"
#include "tests/support/numeric.h"

// What the tests of single ops share.
namespace longspan::test {

inline constexpr DType kFloatDtypes[] = {DType::kF32, DType::kBF16, DType::kF64};

// Fresh memory is NaN, so an element that an op forgets to write shows.
inline Context OpContext(int threads = 2) {
  return Context({.device = {}, .threads = threads, .poison_buffers = true});
}

inline Tensor IntTensor(Context& ctx, const std::vector<int32_t>& values) {
  Tensor t = ctx.Empty({static_cast<int64_t>(values.size())}, DType::kI32);
  std::copy(values.begin(), values.end(), t.data<int32_t>());
  return t;
}

// The largest relative error that a result of `dtype` may have against the exact `reference`, whose
// inputs were representable: rounding noise of a short sum, and for bf16 twice the error that
// rounding the exact result makes.
inline double Bound(DType dtype, const Vec& reference) {
  switch (dtype) {
    case DType::kF64:
      return 1e-13;
    case DType::kBF16:
      return 2 * RelRms(RoundedTo(dtype, reference), reference);
    default:
      return 1e-6;
  }
}

inline bool SameBits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() &&
         (a.bytes() == 0 || std::memcmp(a.raw(), b.raw(), a.bytes()) == 0);
}

// Runs `op` on 1, 2 and 3 threads and expects every tensor it returns to have the same bits.
inline void ExpectSameBitsForAnyThreads(const std::function<std::vector<Tensor>(Context&)>& op) {
  Context one = OpContext(1);
  const std::vector<Tensor> expected = op(one);
  for (const int threads : {2, 3}) {
    Context ctx = OpContext(threads);
    const std::vector<Tensor> actual = op(ctx);
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t i = 0; i < actual.size(); ++i) {
      EXPECT_TRUE(SameBits(actual[i], expected[i])) << "result " << i << " on " << threads;
    }
  }
}

}  // namespace longspan::test
