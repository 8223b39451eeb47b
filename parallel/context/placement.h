#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/core/check.h"

namespace longspan::parallel {

enum class PlacementKind { kContiguous, kZigzag, kStriped, kBalanced };
const char* ToString(PlacementKind kind);

// Half-open range of positions in a packed row.
struct TokenRange {
  int64_t begin = 0, end = 0;
  bool operator==(const TokenRange&) const = default;
};

// Which rank of the cp axis holds which tokens of every packed row, in whole mask blocks (64
// tokens, the last one of a row may be short). One placement serves all layers.
//
//   contiguous  rank r holds part r of P parts
//   zigzag      rank r holds parts r and 2P-1-r of 2P parts, which balances causal masks
//               [Llama 3, arXiv 2407.21783]
//   striped     rank r holds the blocks b with b mod P == r [striped attention, arXiv 2311.09431,
//               by blocks instead of tokens, so that block-sparse masks stay sparse]
//   balanced    by the work of every block row (balance.h), per row of the micro-batch
//
// Any row length and rank count can be placed: parts are as even as whole blocks allow (the first
// ones have one block more), and with fewer blocks than ranks some ranks hold nothing. A training
// run needs the same number of tokens on all ranks: Problem() says what it refuses.
//
// Local storage is row by row and, in each row, in ascending order (of Grouped(): see there);
// kernels get token positions from the block ids. Immutable; rows of equal length throughout.
class Placement {
 public:
  // Empty when rows of `row_length` tokens give all ranks equally many tokens; else one sentence
  // with the nearest lengths that do.
  static std::string Problem(PlacementKind kind, int64_t row_length, int64_t ranks);

  // Throws InvalidArgument for negative rows, a row_length or ranks below 1, more than 2^31 - 1
  // tokens, and for kBalanced, which needs more to go by: Balanced() or balance.h.
  Placement(PlacementKind kind, int64_t rows, int64_t row_length, int64_t ranks);

  // Balanced by `work` [blocks of all rows] >= 0, in any unit: the largest sum of a rank is as
  // small as the search of balance.h gets it, in long runs of blocks where that costs less than 1
  // %. In every row each rank holds floor or ceil (blocks of the row / ranks) blocks, and over all
  // rows the ranks differ by at most one block.
  static Placement Balanced(int64_t rows, int64_t row_length, int64_t ranks,
                            std::span<const int64_t> work);
  // Block b on rank owner[b], of kind balanced.
  static Placement FromOwners(int64_t rows, int64_t row_length, int64_t ranks,
                              std::span<const int32_t> owner);
  // The same blocks on ranks / size ranks: rank g holds what ranks [g size, (g + 1) size) hold, one
  // after another as local storage. `size` must divide ranks().
  Placement Grouped(int64_t size) const;

  PlacementKind kind() const { return kind_; }
  int64_t ranks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t rows() const { return rows_; }
  int64_t row_length() const { return row_length_; }
  int64_t tokens() const { return rows_ * row_length_; }  // of all ranks
  int64_t local_tokens(int64_t rank) const { return blocks(rank).tokens(); }
  int64_t local_tokens() const;  // where all ranks hold equally many
  // The rank that holds a block (global id).
  int owner(int64_t block) const { return owner_[static_cast<size_t>(block)]; }
  const std::vector<int32_t>& owners() const { return owner_; }  // [blocks of all rows]
  // What `rank` holds of a row as maximal ranges, in local order.
  std::vector<TokenRange> parts(int64_t row, int64_t rank) const;
  // Block ids of all rows on `rank` in local order.
  const ops::BlockList& blocks(int64_t rank) const { return blocks_[static_cast<size_t>(rank)]; }

  // Picks rank's elements, in local order, of a per-token array over rows * row_length tokens.
  template <class T>
  std::vector<T> Slice(const std::vector<T>& global, int64_t rank) const {
    LONGSPAN_CHECK(static_cast<int64_t>(global.size()) == tokens())
        << "Placement::Slice of " << global.size() << " elements";
    const ops::BlockList& list = blocks(rank);
    std::vector<T> local;
    local.reserve(static_cast<size_t>(list.tokens()));
    for (size_t i = 0; i < list.ids.size(); ++i) {
      const auto first = global.begin() + ops::BlockFirstToken(row_length_, list.ids[i]);
      local.insert(local.end(), first, first + (list.token_begin[i + 1] - list.token_begin[i]));
    }
    return local;
  }

  // Who holds what, and in which order; kinds that come to the same are equal.
  bool operator==(const Placement& other) const {
    return rows_ == other.rows_ && row_length_ == other.row_length_ && blocks_ == other.blocks_;
  }
  uint64_t Hash() const;

 private:
  Placement(PlacementKind kind, int64_t rows, int64_t row_length,
            std::vector<std::vector<int32_t>> ids);

  PlacementKind kind_;
  int64_t rows_, row_length_;
  std::vector<int32_t> owner_;
  std::vector<ops::BlockList> blocks_;
};

}  // namespace longspan::parallel
