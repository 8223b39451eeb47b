#pragma once
#include <type_traits>

#include "ops/attention/cuda/mma_arguments.cuh"
#include "ops/attention/cuda/mma_normalization.cuh"
#include "ops/attention/cuda/mma_tile.cuh"
#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/launch.h"

namespace longspan::ops::mma {

// Hidden scores become -inf. `token` is the warp's first row among the queries of the block.
template <int kM>
__device__ __forceinline__ void HideScores(Accumulator<kM, kBlock / 8>& s, const std::byte* words,
                                           int token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t* row =
          reinterpret_cast<const uint32_t*>(words) + 2 * (token + 16 * m + 8 * r + lane / 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = row[half] >> (lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float(&pair)[4] = s.at[m][4 * half + n];
          if (!(bits >> (8 * n) & 1)) pair[2 * r] = kMinusInfinity;
          if (!(bits >> (8 * n) & 2)) pair[2 * r + 1] = kMinusInfinity;
        }
      }
    }
  }
}

// One tile: the 64 tokens of query block task.index for query heads [first_head, + kHeads).
template <int kDim, int kHeads, Normalization kNormalization>
class ForwardTile {
 public:
  using Shape = ForwardShape<kDim, kHeads>;
  static constexpr int kM = kHeads;  // 16-row pieces of a warp
  using Rows = std::conditional_t<kNormalization == kSoftmax, SoftmaxRows<kM>, SigmoidRows<kM>>;

  __device__ ForwardTile(const ForwardProblem& problem, std::byte* shared)
      : p_(problem), tiles_{shared} {}

  __device__ __forceinline__ void Run(BlockTask task, int64_t first_head) {
    const DeviceAxis& axis = p_.mask.rows;
    State().Begin(p_.mask, axis, task, axis.token_begin[task.index] * p_.heads + first_head);
    __syncthreads();
    Accumulator<kM, kDim / 8> o;
    o.Clear();
    Rows rows;
    int32_t now = State().StepAt(0);
    if (now >= 0) {
      LoadQueries();
      Load(p_.k, now);
      if constexpr (Shape::kRing == 3) Load(p_.v, now);
    }
    for (int index = 0; now >= 0; ++index) {
      State().Prepare(index + 1);
      const bool masked = now % 2 != 0 || State().Tokens(now / 2) < kBlock;
      if (masked) {
        FillMask(tiles_.shared + Shape::kMask, p_.mask.rule, State(), State().block, now / 2);
      }
      const int k = Arrived();
      if (p_.negate && index == 0) NegateQueries();
      const int32_t next = State().StepAt(index + 1);
      if constexpr (Shape::kRing == 3) {
        Load(p_.k, next);
      } else {
        Load(p_.v, now);
      }
      Accumulator<kM, kBlock / 8> s;
      MultiplyRows<kDim>(s, tiles_, Shape::kQ + WarpRow() * kDim * 2, k);
      if (masked) HideScores(s, tiles_.shared + Shape::kMask, WarpRow() % kBlock);
      rows.Step(s, o, p_.scale_log2, p_.bias_log2);
      const Weights<kM, kBlock / 16> weights(s);
      rows.Count(weights);
      const int v = Arrived();
      Load(Shape::kRing == 3 ? p_.v : p_.k, next);
      AddProduct<kDim>(o, tiles_, weights, v);
      now = next;
    }
    Store(o, rows);
  }

 private:
  __device__ TaskState& State() const {
    return *reinterpret_cast<TaskState*>(tiles_.shared + Shape::kTask);
  }
  // First row of this warp in the tile of queries: rows are tokens of one head, then of the next.
  __device__ int WarpRow() const { return static_cast<int>(threadIdx.x) / 32 * 16 * kM; }

  // Without a commit: arrives with the first tile of keys.
  __device__ void LoadQueries() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      CopyTileAsync<kDim>(tiles_.shared + Shape::kQ + h * TileBytes<kDim>(),
                          p_.q + (State().first_row + h) * p_.dim, p_.q_stride,
                          State().Tokens(State().block), p_.dim);
    }
  }

  // Starts the next tile of the ring; behind the last step an empty group keeps the count.
  __device__ __forceinline__ void Load(const BF16* from, int32_t step) {
    if (step >= 0) {
      CopyTileAsync<kDim>(tiles_.shared + fill_, from + p_.table.Offset(State().kv_head, step / 2),
                          p_.kv_stride, State().Tokens(step / 2), p_.dim);
    }
    cuda::ptx::CopyAsyncCommit();
    fill_ = Following(fill_);
  }

  // The oldest tile, once it is there for all threads; the tile before it is then free.
  __device__ __forceinline__ int Arrived() {
    cuda::ptx::CopyAsyncWait<Shape::kRing - 2>();
    __syncthreads();
    const int tile = use_;
    use_ = Following(use_);
    return tile;
  }
  __device__ static int Following(int tile) {
    constexpr int kLast = Shape::kTiles + (Shape::kRing - 1) * TileBytes<kDim>();
    return tile == kLast ? Shape::kTiles : tile + TileBytes<kDim>();
  }

  // The maxima of a negative scale are those of the negated scores.
  __device__ void NegateQueries() {
    auto* words = reinterpret_cast<uint32_t*>(tiles_.shared + Shape::kQ);
    for (int i = static_cast<int>(threadIdx.x); i < kHeads * TileBytes<kDim>() / 4; i += kThreads) {
      words[i] ^= 0x80008000u;
    }
    __syncthreads();
  }

  __device__ void Store(const Accumulator<kM, kDim / 8>& o, const Rows& rows) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowResult result = rows.Finish(m, r);
        const int tile_row = WarpRow() + 16 * m + 8 * r + lane / 4;
        const int token = tile_row % kBlock;
        if (token >= State().Tokens(State().block)) continue;
        const int64_t row = State().first_row + token * p_.heads + tile_row / kBlock;
        if (kNormalization == kSoftmax && lane % 4 == 0) p_.lse[row] = result.lse;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          const int column = 8 * n + lane % 4 * 2;
          if (column >= p_.dim) break;
          const float a = o.at[m][n][2 * r] * result.factor;
          const float b = o.at[m][n][2 * r + 1] * result.factor;
          if (p_.o_bf16) {
            auto* to = reinterpret_cast<uint32_t*>(static_cast<BF16*>(p_.o) + row * p_.dim);
            to[column / 2] = cuda::ptx::PackBf16(a, b);
          } else {
            auto* to = reinterpret_cast<float2*>(static_cast<float*>(p_.o) + row * p_.dim);
            to[column / 2] = make_float2(a, b);
          }
        }
      }
    }
  }

  const ForwardProblem& p_;
  const Tiles<kDim> tiles_;
  int fill_ = Shape::kTiles, use_ = Shape::kTiles;  // in the ring
};

template <int kDim, int kHeads, Normalization kNormalization>
__global__ __launch_bounds__(kThreads, (ForwardShape<kDim, kHeads>::kResident)) void ForwardKernel(
    const ForwardProblem problem, const TileGrid grid) {
  LONGSPAN_DYNAMIC_SHARED(shared);
  const BlockTask task = problem.mask.rows.tasks[blockIdx.x / grid.tiles];
  const int64_t head = task.kv_head * problem.group + grid.first_head +
                       static_cast<int64_t>(blockIdx.x % grid.tiles) * kHeads;
  ForwardTile<kDim, kHeads, kNormalization>(problem, shared).Run(task, head);
}

template <int kDim, int kHeads, Normalization kNormalization>
void LaunchForward(cuda::Runtime& runtime, const ForwardProblem& problem, const TileGrid& grid) {
  cuda::Launch(runtime, "AttentionForward mma_bf16", ForwardKernel<kDim, kHeads, kNormalization>,
               {dim3(cuda::GridSize(problem.mask.rows.task_count * grid.tiles)), dim3(kThreads),
                ForwardShape<kDim, kHeads>::kBytes},
               problem, grid);
}

}  // namespace longspan::ops::mma
