#pragma once
#include "ops/attention/kv_rows.h"

// CUDA halves of kv_rows.h: operands have been checked.
namespace longspan::ops::internal {

// Two places, of K and of V, that one table applies to; null: only the first.
struct RowPlanes {
  const std::byte* from[2];
  std::byte* to[2];
};

// Copies `width` vectors of `vector_bytes` a token.
void CopyStripsCuda(Context& ctx, const RowTable& table, const RowPlanes& planes,
                    int64_t vector_bytes, int64_t width);
// Adds `width` vectors of `dim` f32 a token.
void AddStripsCuda(Context& ctx, const RowTable& table, const RowPlanes& planes, int64_t dim,
                   int64_t width);
// `rows` times `width` bytes, rows from_stride and to_stride bytes apart.
void CopyColumnsCuda(Context& ctx, int64_t rows, int64_t width, const std::byte* from,
                     int64_t from_stride, std::byte* to, int64_t to_stride);

}  // namespace longspan::ops::internal
