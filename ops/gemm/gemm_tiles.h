#pragma once
#include <cstdint>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

// What the gemm implementations share. Not for use outside ops/gemm.
namespace longspan::ops::internal {

// A checked problem: op(A) [m, k], op(B) [k, n], C [m, n], all >= 1.
struct GemmCall {
  const Tensor& a;
  const Tensor& b;
  Tensor& c;
  bool transpose_a, transpose_b, accumulate;
  int64_t m, n, k;

  // Leading dimensions of the stored matrices, and where a row of op(A) or a column of op(B)
  // starts.
  int64_t lda() const { return transpose_a ? m : k; }
  int64_t ldb() const { return transpose_b ? k : n; }
  int64_t AOffset(int64_t row) const { return transpose_a ? row : row * k; }
  int64_t BOffset(int64_t column) const { return transpose_b ? column * k : column; }
};

// How C is cut: `rows` x `columns` a tile, the last ones may be short.
struct GemmTiling {
  int64_t rows, columns;
};

// Tiles of at most max_rows x max_columns, cut smaller while there are fewer than 16 of them and
// each still has enough work to be worth a task. Depends on the shape only.
GemmTiling ChooseTiling(int64_t m, int64_t n, int64_t k, int64_t max_rows, int64_t max_columns);

void RunOneDnn(Context& ctx, const GemmCall& call);
void RunOneDnnWidened(Context& ctx, const GemmCall& call);
void RunReference(Context& ctx, const GemmCall& call);

// True when oneDNN multiplies bf16 with the processor's bf16 instructions. It also accepts bf16
// on plain AVX-512, but emulates it there at a third of the f32 rate.
bool OneDnnHasBf16();

}  // namespace longspan::ops::internal
