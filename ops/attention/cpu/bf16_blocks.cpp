#include "ops/attention/cpu/bf16_blocks.h"

#include "ops/core/parallel_for.h"

namespace longspan::ops::cpu {

#if defined(LONGSPAN_HAVE_AVX512)
const Bf16Kernels& AmxKernels() {
  static const Bf16Kernels kernels = [] {
    Bf16Kernels all = avx512_bf16::kKernels;
    all.begin_task = amx::Configure;
    all.end_task = amx::Release;
    all.gemm = amx::Gemm;
    return all;
  }();
  return kernels;
}
#endif

Bf16Shape MakeBf16Shape(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return {.heads = heads,
          .kv_heads = kv_heads,
          .group = heads / kv_heads,
          .dim = head_dim,
          .padded = (head_dim + 31) / 32 * 32};
}

OperandRows RowsOf(const Bf16Kernels& kernels, const Bf16Shape& shape, const Tensor& from,
                   int64_t offset, int64_t stride, int64_t tokens, uint16_t* scratch) {
  const int rows = static_cast<int>(tokens), dim = static_cast<int>(shape.dim);
  const int padded = static_cast<int>(shape.padded);
  if (from.dtype() != DType::kBF16) {
    kernels.round_rows(from.data<float>() + offset, stride, rows, dim, padded, scratch);
    return {scratch, shape.padded};
  }
  const auto* at = reinterpret_cast<const uint16_t*>(from.data<BF16>()) + offset;
  if (tokens == kMaskBlock && shape.dim == shape.padded) return {at, stride};
  kernels.copy_rows(at, stride, rows, dim, padded, scratch);
  return {scratch, shape.padded};
}

KeyColumns::KeyColumns(Context& ctx, const Bf16Kernels& kernels, const Bf16Shape& shape,
                       const KvView& kv, const Tensor& keys_or_values, const BlockMask& mask)
    : blocks_(mask.keys().size()),
      stride_(kMaskBlock * shape.padded),
      index_(IndexByBlock(mask.documents(), mask.keys())),
      columns_(ctx.Empty({shape.kv_heads * blocks_ * stride_}, DType::kBF16)) {
  const Scratch scratch(ctx, shape.operand());
  ParallelFor(ctx, shape.kv_heads * blocks_, [&](int64_t i, int worker) {
    const int64_t h = i / blocks_, j = i % blocks_;
    if (mask.column_runs().Row(mask.pattern_of(h), j).empty()) return;  // may be absent from kv
    const int32_t id = mask.keys().ids[static_cast<size_t>(j)];
    const OperandRows rows = RowsOf(kernels, shape, keys_or_values, kv.Offset(h, id),
                                    kv.token_stride(), BlockTokens(mask.documents().row_length, id),
                                    Halves(scratch.Of(worker).Take(shape.operand())));
    kernels.to_columns(rows.at, rows.ld, static_cast<int>(shape.padded),
                       reinterpret_cast<uint16_t*>(columns_.data<BF16>()) + i * stride_);
  });
}

}  // namespace longspan::ops::cpu
