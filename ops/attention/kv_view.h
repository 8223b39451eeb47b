#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// K/V storage plus, per kv head, a table from global key block to element offset, so that received
// pieces are read where they lie. Token i of a block is at offset + i * token_stride.
//
// `k` and `v` may be of any shape; offsets count elements from their first one, and both share the
// tables. A block that is absent has offset -1 and must not be in the mask.
struct KvView {
  Tensor k, v;
  int64_t token_stride = 0;  // elements between tokens of a block
  int64_t kv_heads = 0, head_dim = 0;
  int64_t first_block = 0;       // global id of table entry 0
  int64_t blocks = 0;            // table entries per kv head
  std::vector<int64_t> offsets;  // [kv_heads, blocks]

  int64_t Offset(int64_t kv_head, int64_t block_id) const {
    return offsets[static_cast<size_t>(kv_head * blocks + (block_id - first_block))];
  }
};

// Plain k, v [Tk, Hkv, D] whose rows are the blocks of `keys` in order.
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys);

// Blocks scattered over larger storage k, v [>= Tk rows, Hkv, D]: block i of `keys` starts at row
// first_rows[i] of k and at the same row of v. Throws InvalidArgument when a block does not fit.
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys,
                  std::span<const int64_t> first_rows);

// Where dK and dV go: f32 (f64 in f64 mode), through the same kind of table; contributions are
// ADDED.
struct KvGradView {
  Tensor dk, dv;
  int64_t token_stride = 0;
  int64_t first_block = 0, blocks = 0;
  std::vector<int64_t> offsets;  // [kv_heads, blocks]
  int64_t Offset(int64_t kv_head, int64_t block_id) const {
    return offsets[static_cast<size_t>(kv_head * blocks + (block_id - first_block))];
  }
};
KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys);
KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys,
                          std::span<const int64_t> first_rows);

}  // namespace longspan::ops
