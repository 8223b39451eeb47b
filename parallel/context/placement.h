#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/core/check.h"

namespace longspan::parallel {

enum class PlacementKind { kContiguous, kZigzag };
const char* ToString(PlacementKind kind);

// Half-open range of positions in a packed row.
struct TokenRange {
  int64_t begin = 0, end = 0;
  bool operator==(const TokenRange&) const = default;
};

// Which rank of the cp axis holds which tokens of every packed row. One placement serves all
// layers.
//
//   contiguous  rank r holds part r of P equal parts
//   zigzag      rank r holds parts r and 2P-1-r of 2P equal parts, which balances causal masks
//
// Parts are whole mask blocks (64 tokens) when P > 1. Local storage is row by row and, in each row,
// part by part in ascending order; kernels get token positions from the block ids.
class Placement {
 public:
  // Empty when rows of `row_length` tokens can be placed; else one sentence with the nearest
  // lengths that can.
  static std::string Problem(PlacementKind kind, int64_t row_length, int64_t ranks);

  Placement(PlacementKind kind, int64_t rows, int64_t row_length, int64_t ranks);

  PlacementKind kind() const { return kind_; }
  int64_t ranks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t rows() const { return rows_; }
  int64_t row_length() const { return row_length_; }
  // Equal on all ranks.
  int64_t local_tokens() const { return rows_ * row_length_ / ranks(); }
  // The parts of one row on `rank`, in local order.
  const std::vector<TokenRange>& parts(int64_t rank) const {
    return parts_[static_cast<size_t>(rank)];
  }
  // Block ids of all rows on `rank` in local order.
  const ops::BlockList& blocks(int64_t rank) const { return blocks_[static_cast<size_t>(rank)]; }

  // Picks rank's elements, in local order, of a per-token array over rows * row_length tokens.
  template <class T>
  std::vector<T> Slice(const std::vector<T>& global, int64_t rank) const {
    LONGSPAN_CHECK(static_cast<int64_t>(global.size()) == rows_ * row_length_)
        << "Placement::Slice of " << global.size() << " elements";
    std::vector<T> local;
    local.reserve(static_cast<size_t>(local_tokens()));
    for (int64_t row = 0; row < rows_; ++row) {
      for (const TokenRange& part : parts(rank)) {
        const auto first = global.begin() + row * row_length_;
        local.insert(local.end(), first + part.begin, first + part.end);
      }
    }
    return local;
  }

 private:
  PlacementKind kind_;
  int64_t rows_, row_length_;
  std::vector<std::vector<TokenRange>> parts_;
  std::vector<ops::BlockList> blocks_;
};

}  // namespace longspan::parallel
