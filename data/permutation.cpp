#include "data/permutation.h"

#include <algorithm>
#include <bit>

#include "ops/core/check.h"
#include "ops/core/rng.h"

namespace longspan::data {
namespace {

// Bijective mixing of 64 bits (two rounds of xor-shift and multiply).
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  return x ^ (x >> 32);
}

}  // namespace

KeyedPermutation::KeyedPermutation(int64_t n, uint64_t key) : n_(n) {
  LONGSPAN_CHECK(n >= 1) << "a permutation of " << n << " elements";
  const int bits = std::max(8, static_cast<int>(std::bit_width(static_cast<uint64_t>(n - 1))));
  low_bits_ = bits / 2;
  high_bits_ = bits - low_bits_;
  const Philox rng(key, StreamOf("permutation"));
  for (int r = 0; r < kRounds; ++r) keys_[r] = rng.Bits(r);
}

int64_t KeyedPermutation::operator[](int64_t i) const {
  const uint64_t low_mask = (uint64_t{1} << low_bits_) - 1;
  const uint64_t high_mask = (uint64_t{1} << high_bits_) - 1;
  auto value = static_cast<uint64_t>(i);
  do {
    uint64_t low = value & low_mask, high = value >> low_bits_;
    for (int r = 0; r < kRounds; r += 2) {
      high ^= Mix(low ^ keys_[r]) & high_mask;
      low ^= Mix(high ^ keys_[r + 1]) & low_mask;
    }
    value = high << low_bits_ | low;
  } while (value >= static_cast<uint64_t>(n_));
  return static_cast<int64_t>(value);
}

}  // namespace longspan::data
