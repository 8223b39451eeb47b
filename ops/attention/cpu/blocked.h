#pragma once
#include "ops/attention/cpu/attention_cpu.h"

namespace longspan::ops::cpu {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

// Sizes of one call. Packed operands are [64][ld] with head_dim padded to whole vectors; the extra
// vector in `ld` keeps the rows from falling into the same cache sets.
struct BlockedShape {
  int64_t heads, kv_heads, group, dim, padded, ld;
  int64_t packed() const { return 64 * ld; }  // floats of a packed block
  int64_t lanes() const { return 64 * dim; }  // floats of a transposed block
  static constexpr int64_t kTile = 64 * 64;   // floats of a score tile
};
BlockedShape MakeBlockedShape(const Tensor& q, const KvView& kv);

// One float buffer per worker, allocated once per call and handed out in 64-byte pieces.
class Scratch {
 public:
  Scratch(Context& ctx, int64_t floats_per_worker)
      : buffer_(ctx.Empty({ctx.threads(), floats_per_worker}, DType::kF32)),
        stride_(floats_per_worker) {}
  class Cursor {
   public:
    explicit Cursor(float* at) : at_(at) {}
    float* Take(int64_t floats) {
      float* taken = at_;
      at_ += floats;
      return taken;
    }

   private:
    float* at_;
  };
  Cursor Of(int worker) const { return Cursor(buffer_.data<float>() + worker * stride_); }

 private:
  Tensor buffer_;
  int64_t stride_;
};

// tile = a b^T over head_dim: `rows` packed rows against transposed lanes.
inline void ScoreTile(const BlockKernels& kernels, const BlockedShape& shape, const float* a,
                      int64_t rows, const float* lanes, float* tile) {
  kernels.gemm({.a = a,
                .a_row = shape.ld,
                .a_inner = 1,
                .b = lanes,
                .ldb = 64,
                .c = tile,
                .ldc = 64,
                .rows = static_cast<int>(rows),
                .columns = 64,
                .inner = static_cast<int>(shape.dim),
                .row_scale = nullptr});
}
// to += tile^T b: [lanes of the tile, head_dim]; `ones` are 64 of them.
inline void AccumulateTile(const BlockKernels& kernels, const BlockedShape& shape,
                           const float* tile, int64_t lanes, const float* b, int64_t inner,
                           const float* ones, float* to) {
  kernels.gemm({.a = tile,
                .a_row = 1,
                .a_inner = 64,
                .b = b,
                .ldb = shape.ld,
                .c = to,
                .ldc = shape.ld,
                .rows = static_cast<int>(lanes),
                .columns = static_cast<int>(shape.padded),
                .inner = static_cast<int>(inner),
                .row_scale = ones});
}

// Copies `rows` rows of head_dim elements, `stride` elements apart, to a packed f32 block.
void PackBlock(const BlockKernels& kernels, const BlockedShape& shape, const Tensor& from,
               int64_t offset, int64_t stride, int64_t rows, float* to);

// lse in units of log2 and delta - dlse of one head's `tokens` query rows; of sigmoid minus the
// bias, as GradientStep has it, and 0. The lanes after the last row get lse = +inf, so that their
// probabilities are 0.
void LoadRowStatistics(const BackwardArgs& args, int64_t first_token, int64_t tokens, int64_t head,
                       float* lse, float* delta);

}  // namespace longspan::ops::cpu
