#include "ops/core/sm90_layout.h"

#include <gtest/gtest.h>

#include <set>

// The operands that matrix descriptors describe, element by element as the PTX manual lays them
// out, against the places where tensor copies put them.
namespace longspan::test {
namespace {

using namespace cuda::sm90;

struct Descriptor {
  uint32_t start, leading, stride, base_offset, layout;  // strides in bytes
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        base_offset(static_cast<uint32_t>(bits >> 49 & 7)),
        layout(static_cast<uint32_t>(bits >> 62)) {}
};

// Exclusive or of the chunk in 128 bytes with the number of the 128 bytes in 1024.
uint32_t WithSwizzle(uint32_t linear) {
  const uint32_t chunk = linear / 16 % 8, line = linear / 128 % 8;
  return linear - chunk * 16 + (chunk ^ line) * 16;
}

constexpr uint32_t kBoxes[] = {0, 1024, 5 * 1024, 226 * 1024};

TEST(Sm90LayoutTest, ABoxIsFilledOnce) {
  std::set<uint32_t> places;
  for (uint32_t row = 0; row < 256; ++row) {
    for (uint32_t column = 0; column < kBoxColumns; ++column) {
      const uint32_t at = BoxOffset(row, column);
      EXPECT_EQ(at, WithSwizzle(row * 128 + column * 2));
      EXPECT_EQ(at / kRowBytes, row);
      places.insert(at);
    }
  }
  EXPECT_EQ(places.size(), 256u * kBoxColumns);
}

TEST(Sm90LayoutTest, InnerContiguousMeetsTheBox) {
  for (const uint32_t box : kBoxes) {
    for (uint32_t inner = 0; inner < kBoxColumns; inner += 16) {
      const Descriptor d(InnerContiguous(box, inner));
      EXPECT_EQ(d.layout, 1u);  // 128-byte swizzle
      EXPECT_EQ(d.base_offset, 0u);
      for (uint32_t row = 0; row < 256; ++row) {
        for (uint32_t k = 0; k < 16; ++k) {
          const uint32_t linear = d.start + row / 8 * d.stride + row % 8 * 128 + k * 2;
          ASSERT_EQ(WithSwizzle(linear), box + BoxOffset(row, inner + k)) << row << " " << k;
        }
      }
    }
  }
}

TEST(Sm90LayoutTest, InnerAcrossRowsMeetsTheBoxes) {
  constexpr uint32_t kRows = 64, kBoxBytes = kRows * kRowBytes;
  for (const uint32_t box : kBoxes) {
    if (box + 4 * kBoxBytes > 256 * 1024) continue;  // what 14 bits of address reach
    for (uint32_t inner = 0; inner < kRows; inner += 16) {
      const Descriptor d(InnerAcrossRows(box, inner, kBoxBytes));
      EXPECT_EQ(d.layout, 1u);
      EXPECT_EQ(d.base_offset, 0u);
      for (uint32_t column = 0; column < 256; ++column) {
        for (uint32_t k = 0; k < 16; ++k) {
          const uint32_t linear =
              d.start + column / 64 * d.leading + k / 8 * d.stride + k % 8 * 128 + column % 64 * 2;
          ASSERT_EQ(WithSwizzle(linear),
                    box + column / 64 * kBoxBytes + BoxOffset(inner + k, column % 64))
              << column << " " << k;
        }
      }
    }
  }
}

}  // namespace
}  // namespace longspan::test
