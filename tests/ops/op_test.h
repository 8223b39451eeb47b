#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <span>
#include <vector>

#include "ops/core/context.h"
#include "tests/support/device.h"
#include "tests/support/numeric.h"

// What the tests of single ops share.
namespace longspan::test {

inline constexpr DType kFloatDtypes[] = {DType::kF32, DType::kBF16, DType::kF64};

// The float dtypes of the device that the tests run on.
inline std::span<const DType> FloatDtypes() {
  return std::span(kFloatDtypes).first(OnCuda() ? 2 : 3);
}

// On the device of the tests. Fresh memory is NaN, so an element that an op forgets to write shows.
inline Context OpContext(int threads = 2) {
  return Context({.device = TestDevice(), .threads = threads, .poison_buffers = true});
}

inline Tensor IntTensor(Context& ctx, const std::vector<int32_t>& values) {
  Tensor t = ctx.Empty({static_cast<int64_t>(values.size())}, DType::kI32);
  CopyFromHost(ctx, values.data(), t);
  return t;
}

// As FromVec, in memory that does not start at 16 bytes: a view as row ranges make them.
inline Tensor FromVecUnaligned(Context& ctx, Shape shape, DType dtype, Vec values) {
  values.insert(values.begin(), 0);
  const auto n = static_cast<int64_t>(values.size());
  return FromVec(ctx, {n}, dtype, values).Rows(1, n).Reshape(shape);
}
using MakeTensor = Tensor (*)(Context&, Shape, DType, Vec);
inline Tensor FromVecAligned(Context& ctx, Shape shape, DType dtype, Vec values) {
  return FromVec(ctx, shape, dtype, values);
}
inline constexpr MakeTensor kAlignments[] = {FromVecAligned, FromVecUnaligned};

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
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return false;
  std::vector<std::byte> left(a.bytes()), right(b.bytes());
  CopyToHost(a, left.data());
  CopyToHost(b, right.data());
  return left == right;
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
