#pragma once
#include <array>
#include <cstdint>

namespace longspan::data {

// A pseudo-random permutation of 0..n-1 that is a pure function of (n, key) and needs no table: an
// 8-round Feistel network on the smallest number of bits that holds n - 1, applied again and again
// until the value falls below n (under two times on average). At least 8 bits: on fewer, the round
// functions are too few to reach all orders equally.
class KeyedPermutation {
 public:
  // InvalidArgument for n < 1.
  KeyedPermutation(int64_t n, uint64_t key);

  // The i-th element, 0 <= i < n.
  int64_t operator[](int64_t i) const;
  int64_t size() const { return n_; }

 private:
  static constexpr int kRounds = 8;

  int64_t n_;
  int low_bits_, high_bits_;
  std::array<uint64_t, kRounds> keys_;
};

}  // namespace longspan::data
