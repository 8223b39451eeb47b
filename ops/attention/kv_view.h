#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "ops/attention/block_mask.h"
#include "ops/attention/kv_table.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// K/V storage plus the table of its blocks, so that received pieces are read where they lie.
//
// `k` and `v` may be of any shape; the table's offsets count elements from their first one, and
// both share it. A block that the table lacks must not be in the mask.
struct KvView {
  Tensor k, v;
  int64_t head_dim = 0;
  std::shared_ptr<const KvTable> table;

  int64_t kv_heads() const { return table->kv_heads(); }
  int64_t token_stride() const { return table->token_stride(); }
  int64_t Offset(int64_t kv_head, int64_t block_id) const {
    return table->Offset(kv_head, block_id);
  }
};

// Where dK and dV go: f32 (f64 in f64 mode), through the same kind of table; contributions are
// ADDED.
struct KvGradView {
  Tensor dk, dv;
  std::shared_ptr<const KvTable> table;

  int64_t token_stride() const { return table->token_stride(); }
  int64_t Offset(int64_t kv_head, int64_t block_id) const {
    return table->Offset(kv_head, block_id);
  }
};

// Plain k, v [Tk, Hkv, D] whose rows are the blocks of `keys` in order. With `first_rows` the
// blocks are scattered over larger storage [>= Tk rows, Hkv, D]: block i starts at row
// first_rows[i] of k and at the same row of v. Throws InvalidArgument when a block does not fit.
//
// Given a mask, its keys() are meant, and the mask keeps the table for later views of this layout:
// what a model uses for its layers.
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys);
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys,
                  std::span<const int64_t> first_rows);
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockMask& mask);
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockMask& mask,
                  std::span<const int64_t> first_rows);

KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys);
KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys,
                          std::span<const int64_t> first_rows);
KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockMask& mask);
KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockMask& mask,
                          std::span<const int64_t> first_rows);

}  // namespace longspan::ops
