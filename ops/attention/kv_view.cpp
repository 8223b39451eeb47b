#include "ops/attention/kv_view.h"

#include <algorithm>

namespace longspan::ops {
namespace {

struct Table {
  int64_t first_block = 0, blocks = 0;
  std::vector<int64_t> offsets;
};

// Block i of `keys` starts at row first_rows[i] of storage [rows, heads, dim].
Table MakeTable(const BlockList& keys, std::span<const int64_t> first_rows, int64_t heads,
                int64_t dim) {
  Table table;
  if (keys.ids.empty()) return table;
  const auto [low, high] = std::minmax_element(keys.ids.begin(), keys.ids.end());
  table.first_block = *low;
  table.blocks = *high - *low + 1;
  table.offsets.assign(static_cast<size_t>(heads * table.blocks), -1);
  for (int64_t h = 0; h < heads; ++h) {
    for (size_t i = 0; i < keys.ids.size(); ++i) {
      table.offsets[static_cast<size_t>(h * table.blocks + keys.ids[i] - table.first_block)] =
          (first_rows[i] * heads + h) * dim;
    }
  }
  return table;
}

void CheckPlain(const char* op, const Tensor& a, const Tensor& b, const BlockList& keys) {
  if (a.rank() != 3 || !(a.shape() == b.shape()) || a.dtype() != b.dtype() ||
      a.dim(0) != keys.tokens()) {
    throw InvalidArgument(
        Str(op, ": ", a.Describe(), " and ", b.Describe(), " must be two [", keys.tokens(),
            ", kv heads, head_dim] tensors of one dtype, a row per token of keys"));
  }
}

void CheckScattered(const char* op, const Tensor& a, const Tensor& b, const BlockList& keys,
                    std::span<const int64_t> first_rows) {
  if (a.rank() != 3 || b.rank() != 3 || a.dim(1) != b.dim(1) || a.dim(2) != b.dim(2) ||
      a.dtype() != b.dtype()) {
    throw InvalidArgument(Str(op, ": ", a.Describe(), " and ", b.Describe(),
                              " must be two [rows, kv heads, head_dim] tensors of one dtype"));
  }
  if (first_rows.size() != keys.ids.size()) {
    throw InvalidArgument(Str(op, ": ", first_rows.size(), " first rows for ", keys.ids.size(),
                              " blocks; give one for each"));
  }
  const int64_t rows = std::min(a.dim(0), b.dim(0));
  for (size_t i = 0; i < keys.ids.size(); ++i) {
    const int64_t tokens = keys.token_begin[i + 1] - keys.token_begin[i];
    if (first_rows[i] < 0 || first_rows[i] + tokens > rows) {
      throw InvalidArgument(Str(op, ": block ", keys.ids[i], " needs rows ", first_rows[i], " to ",
                                first_rows[i] + tokens - 1, " of storage with ", rows, " rows"));
    }
  }
}

// The first row of each block where blocks lie one after another.
std::span<const int64_t> PlainRows(const BlockList& keys) {
  return std::span(keys.token_begin).first(keys.ids.size());
}

KvView View(const Tensor& k, const Tensor& v, Table table) {
  return {.k = k,
          .v = v,
          .token_stride = k.dim(1) * k.dim(2),
          .kv_heads = k.dim(1),
          .head_dim = k.dim(2),
          .first_block = table.first_block,
          .blocks = table.blocks,
          .offsets = std::move(table.offsets)};
}

KvGradView GradView(const Tensor& dk, const Tensor& dv, Table table) {
  return {.dk = dk,
          .dv = dv,
          .token_stride = dk.dim(1) * dk.dim(2),
          .first_block = table.first_block,
          .blocks = table.blocks,
          .offsets = std::move(table.offsets)};
}

}  // namespace

KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys) {
  CheckPlain("MakeKvView", k, v, keys);
  return View(k, v, MakeTable(keys, PlainRows(keys), k.dim(1), k.dim(2)));
}

KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys,
                  std::span<const int64_t> first_rows) {
  CheckScattered("MakeKvView", k, v, keys, first_rows);
  return View(k, v, MakeTable(keys, first_rows, k.dim(1), k.dim(2)));
}

KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys) {
  CheckPlain("MakeKvGradView", dk, dv, keys);
  return GradView(dk, dv, MakeTable(keys, PlainRows(keys), dk.dim(1), dk.dim(2)));
}

KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys,
                          std::span<const int64_t> first_rows) {
  CheckScattered("MakeKvGradView", dk, dv, keys, first_rows);
  return GradView(dk, dv, MakeTable(keys, first_rows, dk.dim(1), dk.dim(2)));
}

}  // namespace longspan::ops
