#pragma once
#include "ops/attention/cuda/device_mask.h"
#include "ops/attention/cuda/mma_shape.h"
#include "ops/attention/cuda/mma_visible.h"
#include "ops/core/cuda/ptx.cuh"
#include "ops/core/dtype.h"

// What the tensor-core attention kernels share: tiles on their way into shared memory, products of
// tiles, block masks as bits. A block of threads has kThreads threads.
namespace longspan::ops::mma {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kMinusInfinity = -__builtin_inff();

// Starts the copies of `rows` rows of `dim` elements, `stride` elements apart, into a tile of
// kBlock rows; the rest of the tile becomes 0. The caller commits.
template <int kDim>
__device__ __forceinline__ void CopyTileAsync(std::byte* tile, const BF16* from, int stride,
                                              int rows, int dim) {
  constexpr int kChunks = kDim / 8;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kBlock * kChunks / kThreads; ++i) {
    const int at = i * kThreads + thread;
    const int row = at / kChunks, chunk = at % kChunks;
    const bool inside = row < rows && chunk * 8 < dim;
    const int offset = inside ? row * stride + chunk * 8 : 0;
    cuda::ptx::CopyAsync16(tile + ChunkOffset<kDim>(row, chunk), from + offset, inside);
  }
}

// Where a lane reads the fragments of a tile: rows [16 n, 16 n + 16), chunks 2 p and 2 p + 1. The
// twist of the chunks is one of the address because tiles begin, and 16 rows end, at multiples of
// the bytes that it moves within.
template <int kDim>
class FragmentReader {
 public:
  __device__ explicit FragmentReader(FragmentPlace place)
      : lane_(ChunkOffset<kDim>(place.row, place.chunk)) {}
  // `tile` is a byte offset in shared memory.
  __device__ __forceinline__ const std::byte* At(const std::byte* shared, int tile, int n,
                                                 int p) const {
    constexpr int kPairs = kDim % 64 == 0 ? 4 : 2;  // that the twist moves within
    return shared + ((tile + lane_) ^ (p % kPairs * 32)) +
           (n * 16 * kDim * 2 + p / kPairs * (kPairs * 32));
  }

 private:
  int lane_;  // bytes
};

// The shared memory of a block, and how one thread reads its tiles: as rows of A (and as B by the
// transposing load) and as columns of B.
template <int kDim>
struct Tiles {
  std::byte* shared;
  FragmentReader<kDim> rows{PlaceInRows(static_cast<int>(threadIdx.x) % 32)};
  FragmentReader<kDim> columns{PlaceInColumns(static_cast<int>(threadIdx.x) % 32)};
};

// f32 fragments of [16 kM rows][8 kN columns]: element e of [m][n] is at row 16 m + g + 8 (e / 2)
// and column 8 n + 2 t + e % 2, where lane = 4 g + t.
template <int kM, int kN>
struct Accumulator {
  float at[kM][kN][4];
  __device__ void Clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) at[m][n][e] = 0;
      }
    }
  }
};

// c = a b^T over kDim: the rows of `a` against the rows of `b`, byte offsets of tiles.
template <int kDim, int kM, int kN>
__device__ __forceinline__ void MultiplyRows(Accumulator<kM, kN>& c, const Tiles<kDim>& tiles,
                                             int a, int b) {
  c.Clear();
#pragma unroll
  for (int p = 0; p < kDim / 16; ++p) {
    uint32_t rows[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) cuda::ptx::LoadMatrix4(rows[m], tiles.rows.At(tiles.shared, a, m, p));
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t columns[4];
      cuda::ptx::LoadMatrix4(columns, tiles.columns.At(tiles.shared, b, n, p));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        cuda::ptx::MmaBf16(c.at[m][2 * n], rows[m], columns[0], columns[1]);
        cuda::ptx::MmaBf16(c.at[m][2 * n + 1], rows[m], columns[2], columns[3]);
      }
    }
  }
}

// Weights rounded to bf16 in the order of operand A: [16 kM rows][16 kInner].
template <int kM, int kInner>
struct Weights {
  uint32_t at[kM][kInner][4];
  __device__ explicit Weights(const Accumulator<kM, 2 * kInner>& c) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int k = 0; k < kInner; ++k) {
        const auto& low = c.at[m][2 * k];
        const auto& high = c.at[m][2 * k + 1];
        at[m][k][0] = cuda::ptx::PackBf16(low[0], low[1]);
        at[m][k][1] = cuda::ptx::PackBf16(low[2], low[3]);
        at[m][k][2] = cuda::ptx::PackBf16(high[0], high[1]);
        at[m][k][3] = cuda::ptx::PackBf16(high[2], high[3]);
      }
    }
  }
};

// c += w b: weights against the rows of `b`, of which the columns from 16 * `first_pair` on count.
template <int kDim, int kM, int kInner, int kN>
__device__ __forceinline__ void AddProduct(Accumulator<kM, kN>& c, const Tiles<kDim>& tiles,
                                           const Weights<kM, kInner>& w, int b,
                                           int first_pair = 0) {
#pragma unroll
  for (int k = 0; k < kInner; ++k) {
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t columns[4];
      cuda::ptx::LoadMatrix4Transposed(columns, tiles.rows.At(tiles.shared, b, k, first_pair + n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        cuda::ptx::MmaBf16(c.at[m][2 * n], w.at[m][k], columns[0], columns[1]);
        cuda::ptx::MmaBf16(c.at[m][2 * n + 1], w.at[m][k], columns[2], columns[3]);
      }
    }
  }
}

// The row of the micro-batch that a task works in; all blocks it meets lie there.
struct RowPlace {
  int64_t first_token;  // global
  int32_t first_block;  // global id
  int32_t length;       // tokens

  __device__ RowPlace(const DeviceMask& mask, int32_t block) {
    const int32_t per_row = static_cast<int32_t>(mask.blocks_per_row), row = block / per_row;
    first_block = row * per_row;
    length = static_cast<int32_t>(mask.rule.row_length);
    first_token = static_cast<int64_t>(row) * length;
  }
  __device__ int Tokens(int32_t block) const {
    const int rest = length - (block - first_block) * kBlock;
    return rest < kBlock ? rest : kBlock;
  }
  __device__ int64_t FirstToken(int32_t block) const {
    return first_token + (block - first_block) * kBlock;
  }
};

// Fills words[query][half] (kMaskBytes) for a pair of blocks; all threads, no barrier.
__device__ inline void FillMask(std::byte* shared, const VisibleRule& rule, const RowPlace& place,
                                int64_t kv_head, int32_t query_block, int32_t key_block) {
  static_assert(kThreads == 2 * kBlock);
  const int query = static_cast<int>(threadIdx.x) / 2, half = static_cast<int>(threadIdx.x) % 2;
  const int rest = place.Tokens(key_block) - 32 * half, keys = rest < 32 ? rest : 32;
  uint32_t word = 0;
  if (keys > 0 && query < place.Tokens(query_block)) {
    word = VisibleKeys(rule, kv_head, place.FirstToken(query_block) + query,
                       place.FirstToken(key_block) + 32 * half, keys);
  }
  reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = word;
}

// A block that a task meets.
struct Step {
  int32_t block;  // global id; -1 behind the last one
  bool partial;
  __device__ explicit Step(const EntryCursor& cursor)
      : block(cursor.done() ? -1 : cursor.block()), partial(!cursor.done() && cursor.partial()) {}
  __device__ bool valid() const { return block >= 0; }
};

}  // namespace longspan::ops::mma
