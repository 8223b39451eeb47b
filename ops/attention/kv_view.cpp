#include "ops/attention/kv_view.h"

#include <algorithm>
#include <numeric>

namespace longspan::ops {
namespace {

// Block i of `keys` starts at row first_rows[i] of storage [rows, heads, dim].
std::shared_ptr<const KvTable> MakeTable(const BlockList& keys, std::span<const int64_t> first_rows,
                                         int64_t heads, int64_t dim) {
  int64_t first_block = 0;
  std::vector<int64_t> offsets;
  if (!keys.ids.empty()) {
    const auto [low, high] = std::minmax_element(keys.ids.begin(), keys.ids.end());
    first_block = *low;
    const int64_t blocks = *high - *low + 1;
    offsets.assign(static_cast<size_t>(heads * blocks), -1);
    for (int64_t h = 0; h < heads; ++h) {
      for (size_t i = 0; i < keys.ids.size(); ++i) {
        offsets[static_cast<size_t>(h * blocks + keys.ids[i] - first_block)] =
            (first_rows[i] * heads + h) * dim;
      }
    }
  }
  return std::make_shared<const KvTable>(heads, heads * dim, first_block, std::move(offsets));
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

using Table = std::shared_ptr<const KvTable>;

Table PlainTable(const char* op, const Tensor& a, const Tensor& b, const BlockList& keys) {
  CheckPlain(op, a, b, keys);
  return MakeTable(keys, PlainRows(keys), a.dim(1), a.dim(2));
}
Table PlainTable(const char* op, const Tensor& a, const Tensor& b, const BlockMask& mask) {
  CheckPlain(op, a, b, mask.keys());
  return mask.kv_tables().Get({a.dim(1), a.dim(2), {}}, [&] {
    return MakeTable(mask.keys(), PlainRows(mask.keys()), a.dim(1), a.dim(2));
  });
}
Table ScatteredTable(const char* op, const Tensor& a, const Tensor& b, const BlockList& keys,
                     std::span<const int64_t> first_rows) {
  CheckScattered(op, a, b, keys, first_rows);
  return MakeTable(keys, first_rows, a.dim(1), a.dim(2));
}
Table ScatteredTable(const char* op, const Tensor& a, const Tensor& b, const BlockMask& mask,
                     std::span<const int64_t> first_rows) {
  CheckScattered(op, a, b, mask.keys(), first_rows);
  return mask.kv_tables().Get({a.dim(1), a.dim(2), {first_rows.begin(), first_rows.end()}}, [&] {
    return MakeTable(mask.keys(), first_rows, a.dim(1), a.dim(2));
  });
}

KvView View(const Tensor& k, const Tensor& v, Table table) {
  return {k, v, k.dim(2), std::move(table)};
}

}  // namespace

KvTable::KvTable(int64_t kv_heads, int64_t token_stride, int64_t first_block,
                 std::vector<int64_t> offsets)
    : kv_heads_(kv_heads),
      token_stride_(token_stride),
      first_block_(first_block),
      blocks_(0),
      offsets_(std::move(offsets)) {
  const auto entries = static_cast<int64_t>(offsets_.size());
  if (kv_heads < 1 || entries % kv_heads != 0) {
    throw InvalidArgument(Str("KvTable: ", entries, " offsets for ", kv_heads,
                              " kv heads; give each head the same number of blocks"));
  }
  blocks_ = entries / kv_heads;
  for (const int64_t offset : offsets_) {
    if (offset >= 0) alignment_ = std::gcd(std::gcd(alignment_, offset), token_stride_);
  }
}

KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys) {
  return View(k, v, PlainTable("MakeKvView", k, v, keys));
}
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockList& keys,
                  std::span<const int64_t> first_rows) {
  return View(k, v, ScatteredTable("MakeKvView", k, v, keys, first_rows));
}
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockMask& mask) {
  return View(k, v, PlainTable("MakeKvView", k, v, mask));
}
KvView MakeKvView(const Tensor& k, const Tensor& v, const BlockMask& mask,
                  std::span<const int64_t> first_rows) {
  return View(k, v, ScatteredTable("MakeKvView", k, v, mask, first_rows));
}

KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys) {
  return {dk, dv, PlainTable("MakeKvGradView", dk, dv, keys)};
}
KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockList& keys,
                          std::span<const int64_t> first_rows) {
  return {dk, dv, ScatteredTable("MakeKvGradView", dk, dv, keys, first_rows)};
}
KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockMask& mask) {
  return {dk, dv, PlainTable("MakeKvGradView", dk, dv, mask)};
}
KvGradView MakeKvGradView(const Tensor& dk, const Tensor& dv, const BlockMask& mask,
                          std::span<const int64_t> first_rows) {
  return {dk, dv, ScatteredTable("MakeKvGradView", dk, dv, mask, first_rows)};
}

}  // namespace longspan::ops
