#pragma once
#include <cstdint>

#include "ops/attention/arguments.h"
#include "ops/attention/cuda/device_mask.h"
#include "ops/core/cuda/kernel.cuh"
#include "ops/core/dtype.h"

// What the kernels of reference_cuda share: products of 64-token tiles in f32 on the ordinary
// cores. A block of 16 x 16 threads; thread (y, x) owns rows 4y..4y+3 of a tile and, of each
// column chunk, as many columns per thread as fill it. Operands pass through shared memory a piece
// at a time, so that its size does not depend on head_dim.
//
// Cost: 9 products of 64 x 64 x head_dim a block pair and query head (2 forward, 7 backward). 50
// quickstart steps are 4.7 TFLOP: one second at a tenth of the f32 rate of an H100.
namespace longspan::ops::reference_cuda {

constexpr int kThreads = 256;
constexpr int kTile = kMaskBlock;  // tokens on either side
constexpr int kLd = kTile + 4;     // floats between rows in shared memory; rows start at 16 bytes
constexpr int kDepth = 32;         // head_dim elements of one step of a score product
constexpr int kOwn = 4;            // rows of a thread, and columns of its part of a score tile
constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;

// Shared memory of a block.
struct Shared {
  float operand[kTile * kLd];  // two [kDepth][kLd] of a score product, or one [kTile][kLd]
  float tile[kTile * kLd];     // probabilities or their gradients
};

// One token block of one head: rows of `dim` elements, `stride` apart. Reads 0 outside of it.
struct RowBlock {
  const void* data;
  bool bf16;
  int64_t first, stride;  // elements
  int rows, dim;
  __device__ float At(int r, int d) const {
    if (r >= rows || d >= dim) return 0;
    const int64_t i = first + r * stride + d;
    return bf16 ? static_cast<float>(static_cast<const BF16*>(data)[i])
                : static_cast<const float*>(data)[i];
  }
};

__device__ inline int ThreadX() { return static_cast<int>(threadIdx.x) % 16; }
__device__ inline int ThreadY() { return static_cast<int>(threadIdx.x) / 16; }

// to[d][r] = from(r, d0 + d) for d < kDepth. A warp takes 4 rows x 8 elements at a time, whose
// places in shared memory are in 32 different banks.
template <class Rows>
__device__ void LoadTransposed(const Rows& from, int d0, float* to) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 4
  for (int i = 0; i < kTile * kDepth / kThreads; ++i) {
    const int r = warp * 8 + i % 2 * 4 + lane / 8, d = i / 2 * 8 + lane % 8;
    to[d * kLd + r] = from.At(r, d0 + d);
  }
}

// to[r][d] = from(r, d0 + d) for d < kWidth.
template <int kWidth, class Rows>
__device__ void LoadPlain(const Rows& from, int d0, float* to) {
#pragma unroll 4
  for (int i = 0; i < kTile * kWidth / kThreads; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x);
    to[at / kWidth * kLd + at % kWidth] = from.At(at / kWidth, d0 + at % kWidth);
  }
}

// c[i][j] += sum over t of a[t][4y + i] * b[t][kColumns x + j].
template <int kInner, int kColumns>
__device__ void Multiply(const float* a, const float* b, float (&c)[kOwn][kColumns]) {
  a += ThreadY() * kOwn;
  b += ThreadX() * kColumns;
#pragma unroll 4
  for (int t = 0; t < kInner; ++t) {
    const float4 rows = *reinterpret_cast<const float4*>(a + t * kLd);
    const float left[kOwn] = {rows.x, rows.y, rows.z, rows.w};
    float right[kColumns];
    if constexpr (kColumns == 4) {
      const float4 columns = *reinterpret_cast<const float4*>(b + t * kLd);
      right[0] = columns.x, right[1] = columns.y, right[2] = columns.z, right[3] = columns.w;
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) right[j] = b[t * kLd + j];
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) c[i][j] += left[i] * right[j];
    }
  }
}

// c += a b^T over head_dim. Ends with shared.operand free. a and b have At(row, d) as RowBlock.
template <class A, class B>
__device__ void ScoreProduct(const A& a, const B& b, Shared& shared, float (&c)[kOwn][kOwn]) {
  float *left = shared.operand, *right = shared.operand + kDepth * kLd;
  for (int d0 = 0; d0 < a.dim; d0 += kDepth) {
    LoadTransposed(a, d0, left);
    LoadTransposed(b, d0, right);
    __syncthreads();
    Multiply<kDepth, kOwn>(left, right, c);
    __syncthreads();
  }
}

// A thread's part of a [64, kDim] result: 4 rows, and its columns of each chunk.
template <int kDim>
struct Accumulator {
  static constexpr int kWidth = kDim < kTile ? kDim : kTile;  // columns of a chunk
  static constexpr int kChunks = kDim / kWidth, kColumns = kWidth / 16;
  float at[kChunks][kOwn][kColumns] = {};

  // += tile^T b, where `tile` is [64 inner][64 rows]. What was written to shared.tile before is
  // visible; ends with all of `shared` free.
  template <class Rows>
  __device__ void AddProduct(const Rows& b, Shared& shared) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * kWidth < b.dim) {
        LoadPlain<kWidth>(b, c * kWidth, shared.operand);
        __syncthreads();
        Multiply<kTile, kColumns>(shared.tile, shared.operand, at[c]);
        __syncthreads();
      }
    }
  }
  __device__ void ScaleRow(int i, float factor) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) at[c][i][j] *= factor;
    }
  }
  // Calls f(row, d, value) for the elements that exist.
  template <class F>
  __device__ void ForEach(int rows, int dim, F f) const {
    ForEachIn(at, rows, dim, f);
  }
  // The same with values that f may change.
  template <class F>
  __device__ void ForEachOwn(int rows, int dim, F f) {
    ForEachIn(at, rows, dim, f);
  }

 private:
  template <class Values, class F>
  __device__ static void ForEachIn(Values& values, int rows, int dim, F f) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int row = ThreadY() * kOwn + i, d = c * kWidth + ThreadX() * kColumns + j;
          if (row < rows && d < dim) f(row, d, values[c][i][j]);
        }
      }
    }
  }
};

// A query block against a key block.
struct TilePair {
  int64_t kv_head;
  int64_t first_query, first_key;  // global
  int queries, keys;
  bool partial;
};

// Which of a thread's 16 pairs are visible: bit 4 i + j. Kept apart from the unrolled code, where
// Visible() would stand 16 times.
__device__ inline uint32_t VisiblePairs(const DeviceMask& mask, const TilePair& pair) {
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < kOwn * kOwn; ++n) {
    const int q = ThreadY() * kOwn + n / kOwn, k = ThreadX() * kOwn + n % kOwn;
    if (q >= pair.queries || k >= pair.keys) continue;
    if (!pair.partial || mask.Sees(pair.kv_head, pair.first_query + q, pair.first_key + k)) {
      bits |= 1u << n;
    }
  }
  return bits;
}

// Operands of forward and backward.
struct Problem {
  DeviceMask mask;
  DeviceKvTable table;
  const void *q, *k, *v;
  bool bf16;  // their dtype
  int64_t heads, group;
  int dim;
  float scale;
  float bias_log2;  // of sigmoid

  // Rows of a [Tq, Hq, D] tensor.
  __device__ RowBlock Queries(const void* data, bool is_bf16, int64_t token, int64_t head,
                              int tokens) const {
    return {data, is_bf16, (token * heads + head) * dim, heads * dim, tokens, dim};
  }
  __device__ RowBlock Keys(const void* data, int64_t kv_head, int32_t id) const {
    return {data, bf16, table.Offset(kv_head, id), table.token_stride, mask.Tokens(id), dim};
  }
};

// Of ForwardArgs or BackwardArgs.
template <class Args>
Problem MakeProblem(Context& ctx, const Args& args) {
  return {.mask = OnDevice(ctx, args.mask),
          .table = OnDevice(ctx, *args.kv.table),
          .q = args.q.raw(),
          .k = args.kv.k.raw(),
          .v = args.kv.v.raw(),
          .bf16 = args.q.dtype() == DType::kBF16,
          .heads = args.q.dim(1),
          .group = args.q.dim(1) / args.kv.kv_heads(),
          .dim = static_cast<int>(args.q.dim(2)),
          .scale = static_cast<float>(args.scale),
          .bias_log2 = static_cast<float>(args.bias / kLn2)};
}

// Calls f.operator()<kDim>() with the smallest kernel that holds head_dim.
template <class F>
void DispatchDim(int64_t dim, F&& f) {
  if (dim <= 32) {
    f.template operator()<32>();
  } else if (dim <= 64) {
    f.template operator()<64>();
  } else if (dim <= 128) {
    f.template operator()<128>();
  } else {
    f.template operator()<256>();
  }
}

}  // namespace longspan::ops::reference_cuda
