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

  // Errors    InvalidArgument unless block_size is a positive multiple of 64
  static std::shared_ptr<const RoutedBlocks> Build(int64_t block_size,
                                                   std::shared_ptr<const Documents> documents);
};

// What a choice of blocks needs, checked and allocated, for each implementation of moba.h:
//   gate[t, h, b] = q[t, h] . means[b, h / (heads / kv heads)]
// without a scale, over the candidates b of t; the `width` largest are chosen (all of them when
// there are fewer), the lower block among equals. A gate that is NaN counts as +infinity, so that
// whatever is wrong in a block reaches the output.
struct RouteArgs {
  const Tensor& q;      // [T, heads, D]
  const Tensor& means;  // [count, kv heads, D] f32 (f64)
  const RoutedBlocks& blocks;
  Tensor& selected;  // i32 [heads, T, width]: ascending, then -1
};

// Mean key of every block, [count, kv heads, D] in f32 (f64), summed over the tokens in ascending
// order.
//
// Shapes    k [T, kv heads, D], T = blocks.tokens()
// Dtypes    f32, bf16, f64
// Errors    InvalidArgument naming the argument
// Devices   cpu, cuda
Tensor BlockMeans(Context& ctx, const Tensor& k, const RoutedBlocks& blocks);

}  // namespace longspan::ops
