// GatherHeads against loops over vectors in f64, on the device of the tests.
#include "parallel/context/head_gather.h"

#include <gtest/gtest.h>

#include <cmath>

#include "ops/core/rng.h"
#include "tests/support/device.h"
#include "tests/support/numeric.h"

namespace longspan::test {
namespace {

using namespace parallel;

constexpr int64_t kTokens = 21, kIn = 7, kOut = 5;  // heads of both layouts

// Every output head from one to three input heads, at places of its own.
HeadGather RandomGather(uint64_t seed) {
  const Philox rng(seed, StreamOf("gathers of heads"));
  HeadGather gather;
  gather.tokens = kTokens;
  uint64_t at = 0;
  for (int64_t j = 0; j < kOut; ++j) {
    const auto head = [&] { return static_cast<int64_t>(rng.Below(at++, kIn)); };
    // The first two outputs lie side by side, the others one after another.
    const bool side = j < 2;
    gather.Add(side ? j : j * kTokens, side ? 2 : 1, head(), kIn);
    for (uint64_t more = rng.Below(at++, 3); more > 0; --more) gather.AddSource(head(), kIn);
  }
  return gather;
}

Vec Expected(const HeadGather& gather, const Vec& in, Vec out, int64_t elements) {
  for (int64_t t = 0; t < gather.tokens; ++t) {
    for (const HeadGather::Output& o : gather.outputs) {
      for (int64_t d = 0; d < elements; ++d) {
        double sum = 0;
        for (int32_t s = o.first_source; s < o.first_source + o.sources; ++s) {
          const HeadGather::Source& source = gather.sources[static_cast<size_t>(s)];
          sum += in[static_cast<size_t>((source.from + t * source.from_stride) * elements + d)];
        }
        out[static_cast<size_t>((o.to + t * o.to_stride) * elements + d)] = sum;
      }
    }
  }
  return out;
}

TEST(HeadGatherTest, MovesAndSumsBetweenAllDtypes) {
  Context ctx(ContextOptions{.device = TestDevice()});
  std::vector<std::pair<DType, DType>> dtypes = {
      {DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}, {DType::kF32, DType::kBF16}};
  if (!OnCuda())
    dtypes.insert(dtypes.end(), {{DType::kBF16, DType::kF32}, {DType::kF64, DType::kF64}});
  uint64_t seed = 1;
  for (const auto& [from, to] : dtypes) {
    for (const int64_t elements : {1, 3, 8, 40}) {
      SCOPED_TRACE(
          Str(ToString(from), " to ", ToString(to), ", ", elements, " elements, seed ", seed));
      const HeadGather gather = RandomGather(seed++);
      // Small whole numbers: every sum is exact in every dtype.
      Vec in = Uniform(kTokens * kIn * elements, seed, -40, 40);
      for (double& x : in) x = std::round(x);
      const Vec before(static_cast<size_t>(kTokens * kOut * elements), 7.0);
      const Tensor source = FromVec(ctx, {kTokens, kIn, elements}, from, in);
      const Tensor target = FromVec(ctx, {kTokens * kOut, elements}, to, before);
      GatherHeads(ctx, gather, source, target, elements);
      EXPECT_EQ(ToVec(target), Expected(gather, in, before, elements));
      GatherHeads(ctx, gather, source, target, elements);  // overwrites; the table is kept
      EXPECT_EQ(ToVec(target), Expected(gather, in, before, elements));
    }
  }
}

TEST(HeadGatherTest, RoundsOnceAfterTheSum) {
  Context ctx(ContextOptions{.device = TestDevice()});
  HeadGather gather;
  gather.tokens = 1;
  gather.Add(0, 1, 0, 0);
  gather.AddSource(1, 0);
  gather.AddSource(2, 0);
  // Rounded after each addition this would stay 256.
  const Tensor in = FromVec(ctx, {3, 1}, DType::kF32, {256, 0.75, 0.75});
  const Tensor out = FromVec(ctx, {1, 1}, DType::kBF16, {0});
  GatherHeads(ctx, gather, in, out, 1);
  EXPECT_EQ(ToVec(out), Vec{258});
}

TEST(HeadGatherTest, PlacesOutsideAreRefusedBeforeAnythingIsWritten) {
  Context ctx(ContextOptions{.device = TestDevice()});
  const Tensor in = FromVec(ctx, {4, 2}, DType::kF32, Vec(8, 1.0));
  const Tensor out = FromVec(ctx, {4, 2}, DType::kF32, Vec(8, 5.0));
  for (const auto& [to, from] : {std::pair{2, 0}, {0, 2}, {-1, 0}, {0, -1}}) {
    HeadGather gather;
    gather.tokens = 3;
    gather.Add(0, 1, 0, 1);
    gather.Add(to, 1, from, 1);
    EXPECT_THROW(GatherHeads(ctx, gather, in, out, 2), InvalidArgument) << to << " " << from;
  }
  HeadGather gather;
  gather.tokens = 1;
  gather.Add(0, 1, 0, 1);
  EXPECT_THROW(GatherHeads(ctx, gather, in, ctx.Zeros({1}, DType::kI32), 1), InvalidArgument);
  EXPECT_EQ(ToVec(out), Vec(8, 5.0));
  GatherHeads(ctx, HeadGather{}, in, out, 2);  // nothing to do
}

}  // namespace
}  // namespace longspan::test
