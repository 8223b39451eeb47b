#pragma once
#include <cmath>
#include <cstdint>

#include "ops/attention/pattern.h"

namespace longspan::test {

// The draws of random blocks, once more by the words of docs/attention.md.
class RandomDraws {
 public:
  RandomDraws(const ops::RandomBlocksOptions& random, int64_t kv_head) : random_(random) {
    uint64_t x = static_cast<uint64_t>(random.seed) + 11400714819323198485u;
    for (int64_t h = 0; random.per_head && h <= kv_head; ++h) x += 11400714819323198485u;
    x ^= x >> 30;
    x *= 13787848793156543929u;
    x ^= x >> 27;
    x *= 10723151780598845931u;
    x ^= x >> 31;
    low_ = static_cast<uint32_t>(x & 0xffffffffu);
    high_ = static_cast<uint32_t>(x >> 32);
  }
  // Side 0: queries, side 1: keys.
  int64_t Begin(int64_t tile, int side) const {
    const int64_t slack = random_.mean_blocks - random_.min_blocks;
    if (tile == 0) return 0;
    const int64_t moved = Hash(high_, low_, tile, side) % (slack + 1);
    return tile * random_.mean_blocks + moved - slack / 2;
  }
  int64_t TileOf(int64_t block, int side) const {
    int64_t tile = 0;
    while (Begin(tile + 1, side) <= block) ++tile;
    return tile;
  }
  bool Drawn(int64_t row, int64_t column) const {
    return Hash(low_, high_, row, column) < std::round(random_.density * std::pow(2.0, 32));
  }

 private:
  static uint32_t Scramble(uint32_t x) {
    x ^= x >> 16;
    x *= 2246822507u;
    x ^= x >> 13;
    x *= 3266489909u;
    x ^= x >> 16;
    return x;
  }
  static uint32_t Hash(uint32_t low, uint32_t high, int64_t row, int64_t column) {
    const uint32_t scrambled_row = Scramble(static_cast<uint32_t>(row) ^ low);
    return Scramble(scrambled_row ^ (static_cast<uint32_t>(column) * 2654435761u + high));
  }

  const ops::RandomBlocksOptions& random_;
  uint32_t low_, high_;
};

}  // namespace longspan::test
