#include <algorithm>
#include <vector>

#include "ops/core/parallel_for.h"
#include "ops/gemm/gemm_tiles.h"

namespace longspan::ops::internal {
namespace {

constexpr int64_t kTileRows = 64, kTileColumns = 128, kPanel = 128;  // kPanel values of k at a time
constexpr int64_t kStepRows = 2, kStepK = 4;                         // the inner kernel's block

// Copies to[i][j] = from(i, j) for i < rows, j < columns and zeroes the rest of the padded block.
template <class Acc, class Read>
void Pack(Acc* to, int64_t stride, int64_t rows, int64_t columns, int64_t padded_rows,
          int64_t padded_columns, Read from) {
  for (int64_t i = 0; i < padded_rows; ++i) {
    Acc* row = to + i * stride;
    const int64_t filled = i < rows ? columns : 0;
    for (int64_t j = 0; j < filled; ++j) row[j] = from(i, j);
    std::fill(row + filled, row + padded_columns, Acc(0));
  }
}

// c[2][columns] += a[2][4] b[4][columns], each sum in ascending order of k.
template <class Acc>
void Step(const Acc* __restrict a, const Acc* __restrict b, Acc* __restrict c, int64_t columns) {
  const Acc *b0 = b, *b1 = b + kTileColumns, *b2 = b + 2 * kTileColumns, *b3 = b + 3 * kTileColumns;
  const Acc *x = a, *y = a + kPanel;
  const Acc x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
  const Acc y0 = y[0], y1 = y[1], y2 = y[2], y3 = y[3];
  Acc* __restrict cx = c;
  Acc* __restrict cy = c + kTileColumns;
  for (int64_t j = 0; j < columns; ++j) {
    cx[j] = (((cx[j] + x0 * b0[j]) + x1 * b1[j]) + x2 * b2[j]) + x3 * b3[j];
    cy[j] = (((cy[j] + y0 * b0[j]) + y1 * b1[j]) + y2 * b2[j]) + y3 * b3[j];
  }
}

template <class T, class C>
void RunTile(const GemmCall& call, int64_t row, int64_t column) {
  using Acc = Accumulator<T>;
  const int64_t rows = std::min(kTileRows, call.m - row);
  const int64_t columns = std::min(kTileColumns, call.n - column);
  std::vector<Acc> a(kTileRows * kPanel), b(kPanel * kTileColumns), sum(kTileRows * kTileColumns);
  const T* a_data = call.a.data<T>() + call.AOffset(row);
  const T* b_data = call.b.data<T>() + call.BOffset(column);
  const int64_t a_row = call.transpose_a ? 1 : call.k, a_k = call.transpose_a ? call.m : 1;
  const int64_t b_k = call.transpose_b ? 1 : call.n, b_column = call.transpose_b ? call.k : 1;
  C* c = call.c.data<C>() + row * call.n + column;
  if (call.accumulate) {
    Pack(sum.data(), kTileColumns, rows, columns, kTileRows, kTileColumns,
         [&](int64_t i, int64_t j) { return static_cast<Acc>(c[i * call.n + j]); });
  }
  for (int64_t k = 0; k < call.k; k += kPanel) {
    const int64_t depth = std::min(kPanel, call.k - k);
    const int64_t padded_depth = (depth + kStepK - 1) / kStepK * kStepK;
    Pack(a.data(), kPanel, rows, depth, kTileRows, padded_depth,
         [&](int64_t i, int64_t p) { return static_cast<Acc>(a_data[i * a_row + (k + p) * a_k]); });
    Pack(b.data(), kTileColumns, depth, columns, padded_depth, columns, [&](int64_t p, int64_t j) {
      return static_cast<Acc>(b_data[(k + p) * b_k + j * b_column]);
    });
    for (int64_t i = 0; i < rows; i += kStepRows) {
      for (int64_t p = 0; p < depth; p += kStepK) {
        Step(&a[static_cast<size_t>(i * kPanel + p)], &b[static_cast<size_t>(p * kTileColumns)],
             &sum[static_cast<size_t>(i * kTileColumns)], columns);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Acc* from = &sum[static_cast<size_t>(i * kTileColumns)];
    for (int64_t j = 0; j < columns; ++j) c[i * call.n + j] = C(from[j]);
  }
}

template <class T, class C>
void RunTiles(Context& ctx, const GemmCall& call) {
  const int64_t down = (call.m + kTileRows - 1) / kTileRows;
  const int64_t across = (call.n + kTileColumns - 1) / kTileColumns;
  ParallelFor(ctx, down * across, [&](int64_t task, int) {
    RunTile<T, C>(call, task / across * kTileRows, task % across * kTileColumns);
  });
}

}  // namespace

void RunReference(Context& ctx, const GemmCall& call) {
  DispatchFloat(call.a.dtype(), "Gemm", [&]<class T>() {
    if (call.c.dtype() == call.a.dtype()) {
      RunTiles<T, T>(ctx, call);
    } else {
      RunTiles<T, Accumulator<T>>(ctx, call);
    }
  });
}

}  // namespace longspan::ops::internal
