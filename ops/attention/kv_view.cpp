#include "ops/attention/kv_view.h"

#include <algorithm>

namespace longspan::ops {
namespace {

struct Table {
  int64_t first_block = 0, blocks = 0;
  std::vector<int64_t> offsets;
};

// Offsets of the blocks of `keys`, whose tokens lie one after another in [tokens, heads, dim].
Table MakeTable(const BlockList& keys, int64_t heads, int64_t dim) {
  Table table;
  if (keys.ids.empty()) return table;
  const auto [low, high] = std::minmax_element(keys.ids.begin(), keys.ids.end());
  table.first_block = *low;
  table.blocks = *high - *low + 1;
  table.offsets.assign(static_cast<size_t>(heads * table.blocks), -1);
  for (int64_t h = 0; h < heads; ++h) {
    for (size_t i = 0; i < keys.ids.size(); ++i) {
      table.offsets[static_cast<size_t>(h * table.blocks + keys.ids[i] - table.first_block)] =
          (keys.token_begin[i] * heads + h) * dim;
    }
  }
  return table;
}

void CheckPair(const char* op, const Tensor& a, const Tensor& b, const BlockList& keys) {
  if (a.rank() != 3 || !(a.shape() == b.shape()) || a.dtype() != b.dtype() ||
      a.dim(0) != keys.tokens()) {
    throw InvalidArgument(
        Str(op, ": ", a.Describe(), " and ", b.Describe(), " must be two [", keys.tokens(),
            ", kv heads, head_dim] tensors of one dtype, a row per token of keys"));
  }
}

}  // namespace

KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys) {
  CheckPair("MakeKvView", k, v, keys);
  Table table = MakeTable(keys, k.dim(1), k.dim(2));
  return {.k = k,
          .v = v,
          .token_stride = k.dim(1) * k.dim(2),
          .kv_heads = k.dim(1),
          .head_dim = k.dim(2),
          .first_block = table.first_block,
          .blocks = table.blocks,
          .offsets = std::move(table.offsets)};
}

KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys) {
  CheckPair("MakeKvGradView", dk, dv, keys);
  Table table = MakeTable(keys, dk.dim(1), dk.dim(2));
  return {.dk = dk,
          .dv = dv,
          .token_stride = dk.dim(1) * dk.dim(2),
          .first_block = table.first_block,
          .blocks = table.blocks,
          .offsets = std::move(table.offsets)};
}

}  // namespace longspan::ops
