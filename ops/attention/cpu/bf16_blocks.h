#pragma once
#include <vector>

#include "ops/attention/cpu/attention_cpu.h"
#include "ops/attention/cpu/blocked.h"

namespace longspan::ops::cpu {

// Sizes of one call, in floats of scratch memory.
struct Bf16Shape {
  int64_t heads, kv_heads, group, dim, padded;         // padded: dim up to a multiple of 32
  int64_t operand() const { return 64 * padded / 2; }  // rows, columns or lanes of a block
  int64_t result() const { return 64 * padded; }       // [padded][64] f32
  static constexpr int64_t kScores = 64 * 64;          // f32 score tile
  static constexpr int64_t kPairs = 64 * 64 / 2;       // bf16 score tile in lanes form
};
Bf16Shape MakeBf16Shape(int64_t heads, int64_t kv_heads, int64_t head_dim);

// 64 token rows as an operand.
struct OperandRows {
  const uint16_t* at;
  int64_t ld;
};
// The `tokens` rows of head_dim elements at `offset` of `from`, `stride` elements apart: where they
// lie if they are complete blocks of bf16, otherwise padded (and rounded) into `scratch`.
OperandRows RowsOf(const Bf16Kernels& kernels, const Bf16Shape& shape, const Tensor& from,
                   int64_t offset, int64_t stride, int64_t tokens, uint16_t* scratch);

// The columns form of the keys (or values) that a mask needs: computed once and shared by all tasks
// of a call. O(tokens).
class KeyColumns {
 public:
  KeyColumns(Context& ctx, const Bf16Kernels& kernels, const Bf16Shape& shape, const KvView& kv,
             const Tensor& keys_or_values, const BlockMask& mask);
  const uint16_t* Of(int64_t kv_head, int32_t key_block) const {
    const int64_t at = kv_head * blocks_ + index_[static_cast<size_t>(key_block)];
    return reinterpret_cast<const uint16_t*>(columns_.data<BF16>()) + at * stride_;
  }

 private:
  int64_t blocks_, stride_;
  std::vector<int32_t> index_;  // by block id
  Tensor columns_;
};

// lse in units of log2 and delta - dlse of the query blocks of a backward pass, 64 of each a block
// and query head: see LoadRowStatistics.
class RowStatistics {
 public:
  RowStatistics(Context& ctx, const BackwardArgs& args);
  const float* Lse(int32_t query_block, int64_t head) const {
    return values_.data<float>() +
           (index_[static_cast<size_t>(query_block)] * heads_ + head) * 2 * kMaskBlock;
  }
  const float* Delta(int32_t query_block, int64_t head) const {
    return Lse(query_block, head) + kMaskBlock;
  }

 private:
  int64_t heads_;
  std::vector<int32_t> index_;  // by block id
  Tensor values_;
};

// Sets up and gives back what the kernels need of a thread.
class KernelTask {
 public:
  explicit KernelTask(const Bf16Kernels& kernels) : kernels_(kernels) { kernels_.begin_task(); }
  ~KernelTask() { kernels_.end_task(); }
  KernelTask(const KernelTask&) = delete;
  KernelTask& operator=(const KernelTask&) = delete;

 private:
  const Bf16Kernels& kernels_;
};

// The rows of one head lie too far apart for the processor to guess them.
inline Bf16Ahead AheadOf(const Tensor& t, int64_t offset, int64_t stride, int64_t elements,
                         int64_t tokens) {
  const auto size = static_cast<int64_t>(SizeOf(t.dtype()));
  return {.at = t.raw() + offset * size,
          .stride = stride * size,
          .bytes = static_cast<int>(elements * size),
          .rows = static_cast<int>(tokens)};
}

// One product of operands with rows of `a` `a_row` elements apart.
inline void Multiply(const Bf16Kernels& kernels, const OperandRows& a, const uint16_t* b,
                     int64_t inner, float* c, int64_t rows, bool add, const Bf16Ahead& ahead = {},
                     const Bf16Ahead& also = {}) {
  const Bf16Product product{a.at, b, static_cast<int>(inner)};
  kernels.gemm({.products = &product,
                .count = 1,
                .a_row = a.ld,
                .c = c,
                .rows = static_cast<int>(rows),
                .add = add,
                .ahead = {ahead, also}});
}

inline uint16_t* Halves(float* scratch) { return reinterpret_cast<uint16_t*>(scratch); }

}  // namespace longspan::ops::cpu
