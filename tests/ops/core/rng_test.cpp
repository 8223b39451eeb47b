#include "ops/core/rng.h"

#include <gtest/gtest.h>

namespace longspan::test {
namespace {

using Words = std::array<uint32_t, 4>;

// The known answers that come with the authors' library Random123, for philox4x32-10.
TEST(PhiloxTest, KnownAnswers) {
  EXPECT_EQ(Philox(0, 0).Block(0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox(~uint64_t{0}, ~uint64_t{0}).Block(~uint64_t{0}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  // Counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0.
  EXPECT_EQ(Philox(0x299f31d0a4093822, 0x0370734413198a2e).Block(0x85a308d3243f6a88),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxTest, DerivedValuesComeFromTheWords) {
  const Philox rng(0, 0);
  EXPECT_EQ(rng.Bits(0), 0xe169c58d6627e8d5u);
  EXPECT_EQ(rng.Uniform(0), static_cast<double>(0xe169c58d6627e8d5u >> 11) / 0x1p53);
  EXPECT_EQ(rng.Below(0, 16), 0xeu);  // the upper bits
  EXPECT_EQ(rng.Below(0, 1), 0u);
}

}  // namespace
}  // namespace longspan::test
