#include "ops/core/dtype.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "tests/support/numeric.h"

namespace longspan::test {
namespace {

uint16_t BitsOf(uint32_t f32) { return BF16(std::bit_cast<float>(f32)).bits; }

TEST(DTypeTest, BF16RoundsToNearestEven) {
  EXPECT_EQ(BitsOf(0x3f800000), 0x3f80);  // 1
  EXPECT_EQ(BitsOf(0x3f807fff), 0x3f80);
  EXPECT_EQ(BitsOf(0x3f808000), 0x3f80);  // a tie, down to even
  EXPECT_EQ(BitsOf(0x3f808001), 0x3f81);
  EXPECT_EQ(BitsOf(0x3f818000), 0x3f82);  // a tie, up to even
  EXPECT_EQ(BitsOf(0xbf818000), 0xbf82);
  EXPECT_EQ(BitsOf(0x3fff8000), 0x4000);  // the carry reaches the exponent
  EXPECT_EQ(BitsOf(0x00008000), 0x0000);  // below the smallest normal value
  EXPECT_EQ(BitsOf(0x00008001), 0x0001);
  EXPECT_EQ(BitsOf(0x007f8000), 0x0080);
}

TEST(DTypeTest, BF16KeepsSignsInfinitiesAndNan) {
  EXPECT_EQ(BitsOf(0x00000000), 0x0000);
  EXPECT_EQ(BitsOf(0x80000000), 0x8000);
  EXPECT_EQ(BitsOf(0x7f800000), 0x7f80);
  EXPECT_EQ(BitsOf(0xff800000), 0xff80);
  EXPECT_EQ(BitsOf(0x7f7fffff), 0x7f80);  // the largest f32 rounds to infinity
  EXPECT_EQ(BitsOf(0x7f7f7fff), 0x7f7f);
  for (const uint32_t nan : {0xffffffffu, 0x7fffffffu, 0x7f800001u, 0xff800001u}) {
    const uint16_t bits = BitsOf(nan);
    EXPECT_GT(bits & 0x7fff, 0x7f80) << std::hex << nan << " became " << bits;
    EXPECT_EQ(bits >> 15, nan >> 31) << std::hex << nan << " became " << bits;
  }
}

TEST(DTypeTest, BF16WidensExactly) {
  const auto widened = [](uint16_t bits) {
    BF16 value;
    value.bits = bits;
    EXPECT_EQ(std::bit_cast<uint32_t>(static_cast<float>(value)), uint32_t{bits} << 16);
    return static_cast<double>(value);
  };
  EXPECT_EQ(widened(0x3f81), 1 + 0x1p-7);
  EXPECT_EQ(widened(0xc040), -3);
  EXPECT_EQ(widened(0x0001), 0x1p-133);
  EXPECT_TRUE(std::signbit(widened(0x8000)));
}

// What the tests of other ops expect of a rounded result, written in another way.
TEST(DTypeTest, BF16AgreesWithTheRoundingOfTheTests) {
  Vec values = Normal(2000, 1);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(std::ldexp(values[i], static_cast<int>(i % 280) - 150));
  }
  for (const double v : {1 + 0x1p-8, 1 + 0x3p-8, -0.0, 3.4e38, -3.4e38, 0x1p-134, 0x3p-134}) {
    values.push_back(v);
  }
  const Vec rounded = RoundedTo(DType::kBF16, values);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto actual = static_cast<double>(BF16(static_cast<float>(values[i])));
    EXPECT_EQ(actual, rounded[i]) << values[i];
    EXPECT_EQ(std::signbit(actual), std::signbit(rounded[i])) << values[i];
  }
}

}  // namespace
}  // namespace longspan::test
