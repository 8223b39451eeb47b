#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/attention/documents.h"
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

// Up to 64 queries of one block, so that all have the same candidates, those with most first.
struct RoutedTile {
  int64_t begin;              // global index of the first
  int64_t first, candidates;  // blocks
  int32_t tokens;
};

std::vector<RoutedTile> QueryTilesOf(const RoutedBlocks& blocks);

// Mean key of every block, [count, kv heads, D] in f32 (f64), summed over the tokens in ascending
// order.
//
// Shapes    k [T, kv heads, D], T = blocks.tokens()
// Dtypes    f32, bf16, f64
// Errors    InvalidArgument naming the argument
// Devices   cpu, cuda
Tensor BlockMeans(Context& ctx, const Tensor& k, const RoutedBlocks& blocks);

}  // namespace longspan::ops
