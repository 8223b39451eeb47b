#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "ops/attention/block_mask.h"

namespace longspan::parallel {

// Sets of blocks, one for each rank, as bits.
class BlockBits {
 public:
  BlockBits(int64_t ranks, int64_t blocks)
      : words_((blocks + 63) / 64), bits_(static_cast<size_t>(ranks * words_)) {}

  void Clear() { std::fill(bits_.begin(), bits_.end(), 0); }
  void Add(int64_t rank, int64_t block) { Row(rank)[block / 64] |= uint64_t{1} << block % 64; }
  // All blocks of a run, 64 at a time where it is dense enough.
  void Add(int64_t rank, const ops::BlockRun& run);
  bool Has(int64_t rank, int64_t block) const {
    return Of(rank)[static_cast<size_t>(block / 64)] >> block % 64 & 1;
  }
  std::span<const uint64_t> Of(int64_t rank) const {
    return {bits_.data() + rank * words_, static_cast<size_t>(words_)};
  }

 private:
  uint64_t* Row(int64_t rank) { return bits_.data() + rank * words_; }

  int64_t words_;
  std::vector<uint64_t> bits_;
};

}  // namespace longspan::parallel
