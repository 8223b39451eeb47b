#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/attention/documents.h"
#include "ops/attention/kv_table.h"
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// The key blocks among which routed layers choose, for one micro-batch: `block_size` tokens of the
// row's grid, cut where documents end. Block b holds the tokens [begin[b], begin[b + 1]) (global
// indices, documents.h); together they are all tokens. A token may choose the blocks of its
// document that end before its own block begins: [first_candidate[b], b) for the tokens of b.
struct RoutedBlocks {
  int64_t block_size = 0;
  std::shared_ptr<const Documents> documents;
  std::vector<int64_t> begin;            // [count + 1]
  std::vector<int32_t> first_candidate;  // [count]
  DeviceCopies device_copies;            // see cuda/device_routed.h
  KvTableCache tables;                   // of views of plain tensors (routed_attention.h)

  int64_t count() const { return static_cast<int64_t>(first_candidate.size()); }
  int64_t tokens() const { return begin.back(); }
  int64_t TokensOf(int64_t block) const {
    return begin[static_cast<size_t>(block) + 1] - begin[static_cast<size_t>(block)];
  }
  int64_t CandidatesOf(int64_t block) const {
    return block - first_candidate[static_cast<size_t>(block)];
  }
  int64_t MostCandidates() const;
  // The ends of the blocks of each row, as documents.h takes them.
  std::vector<std::vector<int64_t>> EndsByRow() const;

  // Errors    InvalidArgument unless block_size is a multiple of 64 from 64 to 2^31
  static std::shared_ptr<const RoutedBlocks> Build(int64_t block_size,
                                                   std::shared_ptr<const Documents> documents);
};

// Which rows of q, k and v are tokens of which block: rows [begin[i], begin[i + 1]) are all that a
// rank has of block[i]. Without context parallelism: all tokens of all blocks.
struct RoutedShare {
  std::vector<int32_t> block;  // ascending
  std::vector<int64_t> begin;  // [block.size() + 1], from 0 on
  DeviceCopies device_copies;

  int64_t count() const { return static_cast<int64_t>(block.size()); }
  int64_t rows() const { return begin.back(); }
  int64_t TokensOf(int64_t i) const {
    return begin[static_cast<size_t>(i) + 1] - begin[static_cast<size_t>(i)];
  }

  static RoutedShare All(const RoutedBlocks& blocks);
  // Of local storage in which the mask blocks `local` lie one after another. InvalidArgument unless
  // they ascend, so that a block's tokens follow each other.
  static RoutedShare Of(const RoutedBlocks& blocks, const BlockList& local);
};

// Up to 64 rows of q that are tokens of one block, so that all have the same candidates.
struct RoutedTile {
  int64_t begin;              // first row
  int64_t first, candidates;  // blocks
  int32_t tokens;
};

// The queries of routed attention: every row of q is in one tile. Immutable.
struct RoutedQueries {
  int64_t rows = 0;
  int64_t most_candidates = 0;    // of any token of the micro-batch
  std::vector<RoutedTile> tiles;  // those with most candidates first
  DeviceCopies device_copies;

  static std::shared_ptr<const RoutedQueries> Of(const RoutedBlocks& blocks,
                                                 const RoutedShare& share);
  // Blocks [first, last) that the rows of each stretch of `rows_each` may choose.
  struct Range {
    int64_t first, last;
  };
  std::vector<Range> RangesOf(int64_t rows_each) const;
};

// What the rows of `k` add to the mean key of their blocks, [share.count(), kv heads, D] in f32
// (f64): the sum over their tokens, ascending, divided by the number of all tokens of the block.
// With all tokens it is the mean. `rows`, when larger than share.count(), makes the result so many
// rows long, with 0 at the end.
//
// Shapes    k [share.rows(), kv heads, D]
// Dtypes    f32, bf16, f64
// Errors    InvalidArgument naming the argument
// Devices   cpu, cuda
Tensor BlockMeans(Context& ctx, const Tensor& k, const RoutedBlocks& blocks,
                  const RoutedShare& share, int64_t rows = 0);

}  // namespace longspan::ops
