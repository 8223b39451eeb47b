#pragma once
#include "ops/attention/cuda/device_mask.h"
#include "ops/attention/cuda/mma_shape.h"
#include "ops/attention/cuda/mma_visible.h"
#include "ops/core/cuda/ptx.cuh"
#include "ops/core/dtype.h"

// What the tensor-core attention kernels share: tiles on their way into shared memory, products of
// tiles, block masks as bits. A block of threads has kThreads threads.
namespace longspan::ops::mma {

inline constexpr double kLn2 = 0.6931471805599453;
inline constexpr float kMinusInfinity = -__builtin_inff();

// Starts the copies of `rows` rows of `dim` elements, `stride` elements apart, into a tile of
// kBlock rows; the rest of the tile becomes 0. The caller commits.
template <int kDim>
__device__ __forceinline__ void CopyTileAsync(std::byte* tile, const BF16* from, int stride,
                                              int rows, int dim) {
  constexpr unsigned kChunks = kDim / 8;
  const unsigned thread = cuda::ptx::ThreadIndexAnew();
  // Unrolled further, the addresses would take registers from the accumulators.
#pragma unroll 2
  for (unsigned i = 0; i < kBlock * kChunks / kThreads; ++i) {
    const unsigned at = i * kThreads + thread;
    const int row = static_cast<int>(at / kChunks), chunk = static_cast<int>(at % kChunks);
    const bool inside = row < rows && chunk * 8 < dim;
    const int offset = inside ? row * stride + chunk * 8 : 0;
    cuda::ptx::CopyAsync16(tile + ChunkOffset<kDim>(row, chunk), from + offset, inside);
  }
}

// Where a lane reads the fragments of a tile, which lies at a byte offset in shared memory.
template <int kDim>
class FragmentReader {
 public:
  __device__ explicit FragmentReader(FragmentPlace place)
      : lane_(ChunkOffset<kDim>(place.row, place.chunk)) {}
  __device__ __forceinline__ const std::byte* At(const std::byte* shared, int tile, int n,
                                                 int p) const {
    return shared + FragmentOffset<kDim>(lane_, tile, n, p);
  }

 private:
  int lane_;
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
    for (int m = 0; m < kM; ++m)
      cuda::ptx::LoadMatrix4(rows[m], tiles.rows.At(tiles.shared, a, m, p));
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

// What a block of threads knows about its task, in shared memory. The blocks that the task meets
// are listed kListedSteps at a time.
struct TaskState {
  EntryCursor cursor[2];        // where the list goes on, alternating
  int32_t steps[kListedSteps];  // 2 * global id + partial; -1 behind the last
  int64_t row_token;            // global index of the first token of the micro-batch's row
  int64_t first_row;            // kernel's own
  int32_t row_block;            // global id of the first block of that row
  int32_t row_length;           // tokens
  int32_t kv_head, rule_head;   // rule_head: for VisibleKeys
  int32_t block;                // global id of the task's own

  __device__ int Tokens(int32_t id) const {
    const int rest = row_length - (id - row_block) * kBlock;
    return rest < kBlock ? rest : kBlock;
  }
  __device__ int64_t FirstToken(int32_t id) const { return row_token + (id - row_block) * kBlock; }

  // All threads; a barrier follows.
  __device__ void Begin(const DeviceMask& mask, const DeviceAxis& axis, BlockTask task,
                        int64_t own_first_row) {
    List(mask.Entries(axis, task), 1);
    if (threadIdx.x != 0) return;
    const int32_t per_row = static_cast<int32_t>(mask.blocks_per_row);
    block = axis.ids[task.index];
    kv_head = task.kv_head;
    rule_head = mask.rule_head[task.kv_head];
    row_block = block / per_row * per_row;
    row_length = static_cast<int32_t>(mask.rule.row_length);
    row_token = static_cast<int64_t>(block / per_row) * row_length;
    first_row = own_first_row;
  }

  // The step at `index` > 0 may be read from the next barrier on.
  __device__ __forceinline__ void Prepare(int index) {
    if (index % kListedSteps != 0) return;
    const int turn = index / kListedSteps % 2;
    List(cursor[turn], 1 - turn);
  }
  __device__ int32_t StepAt(int index) const { return steps[index % kListedSteps]; }

 private:
  __device__ void List(EntryCursor from, int next) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kListedSteps) return;
    from.Skip(thread);
    steps[thread] = from.done() ? -1 : from.block() * 2 + static_cast<int32_t>(from.partial());
    if (thread != kListedSteps - 1) return;
    from.Skip(1);
    cursor[next] = from;
  }
};
static_assert(sizeof(TaskState) <= kTaskBytes);

// Fills words[query][half] (kMaskBytes) for a pair of blocks; all threads, no barrier.
__device__ inline void FillMask(std::byte* words, const VisibleRule& rule, const TaskState& task,
                                int32_t query_block, int32_t key_block) {
  static_assert(kThreads == 2 * kBlock);
  const int query = static_cast<int>(threadIdx.x) / 2, half = static_cast<int>(threadIdx.x) % 2;
  const int rest = task.Tokens(key_block) - 32 * half, keys = rest < 32 ? rest : 32;
  uint32_t word = 0;
  if (keys > 0 && query < task.Tokens(query_block)) {
    word = VisibleKeys(rule, task.rule_head, task.FirstToken(query_block) + query,
                       task.FirstToken(key_block) + 32 * half, keys);
  }
  reinterpret_cast<uint32_t*>(words)[threadIdx.x] = word;
}

}  // namespace longspan::ops::mma
