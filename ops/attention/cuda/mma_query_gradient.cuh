#pragma once
#include "ops/attention/cuda/mma_arguments.cuh"
#include "ops/attention/cuda/mma_normalization.cuh"
#include "ops/attention/cuda/mma_tile.cuh"
#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/launch.h"

// dq += scale * ds k: tasks over query blocks like the forward pass, scores computed again.
namespace longspan::ops::mma {

template <int kDim, int kHeads, Normalization kNormalization>
class QueryGradientTile {
 public:
  using Shape = QueryGradientShape<kDim, kHeads>;
  static constexpr int kM = kHeads;               // 16-row pieces of a warp
  static constexpr int kKeys = Shape::kStepKeys;  // scores held at a time
  using Scores = Accumulator<kM, kKeys / 8>;

  __device__ QueryGradientTile(const BackwardProblem& problem, std::byte* shared)
      : p_(problem), tiles_{shared} {}

  __device__ __forceinline__ void Run(BlockTask task, int64_t first_head) {
    const DeviceAxis& axis = p_.mask.rows;
    const int64_t first_token = axis.token_begin[task.index];
    State().Begin(p_.mask, axis, task, first_token * p_.heads + first_head);
    __syncthreads();
    int32_t now = State().StepAt(0);
    if (now < 0) return;
    LoadQueries();
    Load(Shape::kK, p_.k, now);
    Load(Shape::kV, p_.v, now);
    if constexpr (kNormalization == kSoftmax)
      LoadStatistics(first_head * p_.statistics_stride + first_token);
    Accumulator<kM, kDim / 8> dq;
    dq.Clear();
    for (int index = 0; now >= 0; ++index) {
      State().Prepare(index + 1);
      if (Masked(now)) {
        FillMask(tiles_.shared + Shape::kMask, p_.mask.rule, State(), State().block, now / 2);
      }
      cuda::ptx::CopyAsyncWait<1>();  // V may be under way still
      __syncthreads();
      Load(KTile(index + 1), p_.k, State().StepAt(index + 1));
      int32_t next = -1;
#pragma unroll 1
      for (int first = 0; first < kBlock; first += kKeys) {
        const int rows = first * kDim * 2, k = KTile(index) + rows;  // bytes
        Scores s, dp;
        MultiplyRows<kDim>(s, tiles_, Shape::kQ + WarpRow() * kDim * 2, k);
        if (first == 0) {
          cuda::ptx::CopyAsyncWait<1>();  // the newest is K of the next step
          __syncthreads();
        }
        MultiplyRows<kDim>(dp, tiles_, Shape::kDOut + WarpRow() * kDim * 2, Shape::kV + rows);
        ScoreGradients(s, dp);
        if (Masked(now)) Hide(dp, first / 32);
        if (first + kKeys == kBlock) {  // V and the mask are free
          next = State().StepAt(index + 1);
          __syncthreads();
          Load(Shape::kV, p_.v, next);
        }
        const Weights<kM, kKeys / 16> ds(dp);
        AddProduct<kDim>(dq, tiles_, ds, k);
      }
      now = next;
    }
    Add(dq);
  }

 private:
  __device__ TaskState& State() const {
    return *reinterpret_cast<TaskState*>(tiles_.shared + Shape::kTask);
  }
  // First row of this warp in the tile of queries: rows are tokens of one head, then of the next.
  __device__ int WarpRow() const { return static_cast<int>(threadIdx.x) / 32 * 16 * kM; }
  __device__ int TileRow(int m, int r) const {
    return WarpRow() + 16 * m + 8 * r + static_cast<int>(threadIdx.x) % 32 / 4;
  }

  __device__ bool Masked(int32_t step) const {
    return step % 2 != 0 || State().Tokens(step / 2) < kBlock;
  }
  __device__ static int KTile(int index) { return Shape::kK + index % 2 * TileBytes<kDim>(); }

  // Without a commit: arrives with the first tile of keys.
  __device__ void LoadQueries() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int64_t from = (State().first_row + h) * p_.dim;
      const int tokens = State().Tokens(State().block);
      CopyTileAsync<kDim>(tiles_.shared + Shape::kQ + h * TileBytes<kDim>(), p_.q + from,
                          p_.q_stride, tokens, p_.dim);
      CopyTileAsync<kDim>(tiles_.shared + Shape::kDOut + h * TileBytes<kDim>(), p_.d_out + from,
                          p_.q_stride, tokens, p_.dim);
    }
  }
  __device__ __forceinline__ void Load(int tile, const BF16* from, int32_t step) {
    if (step >= 0) {
      CopyTileAsync<kDim>(tiles_.shared + tile, from + p_.table.Offset(State().kv_head, step / 2),
                          p_.kv_stride, State().Tokens(step / 2), p_.dim);
    }
    cuda::ptx::CopyAsyncCommit();
  }
  // Rows behind the last token get weight 0.
  __device__ void LoadStatistics(int64_t first) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = TileRow(m, r), token = row % kBlock;
        float2 value = make_float2(-kMinusInfinity, 0);
        if (token < State().Tokens(State().block)) {
          value = p_.statistics[first + row / kBlock * p_.statistics_stride + token];
        }
        lse_[m][r] = value.x;
        delta_[m][r] = value.y;
      }
    }
  }

  // dp becomes ds: of softmax p (dp - delta), p = exp2(scale s - lse); of sigmoid p (1 - p) dp.
  __device__ __forceinline__ void ScoreGradients(const Scores& s, Scores& dp) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (kNormalization == kSoftmax) {
            const float p = cuda::ptx::Exp2(fmaf(s.at[m][n][e], p_.scale_log2, -lse_[m][e / 2]));
            dp.at[m][n][e] = p * (dp.at[m][n][e] - delta_[m][e / 2]);
          } else {
            dp.at[m][n][e] *= SigmoidWeight(fmaf(s.at[m][n][e], p_.scale_log2, p_.bias_log2)).slope;
          }
        }
      }
    }
  }

  // Gradients of hidden scores become 0; the first key is 32 * half.
  __device__ __forceinline__ void Hide(Scores& ds, int half) const {
    const auto* words = reinterpret_cast<const uint32_t*>(tiles_.shared + Shape::kMask);
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const uint32_t word = words[2 * (TileRow(m, r) % kBlock) + half + n / 4];
          const uint32_t bits = word >> (n % 4 * 8 + lane % 4 * 2);
          if (!(bits & 1)) ds.at[m][n][2 * r] = 0;
          if (!(bits & 2)) ds.at[m][n][2 * r + 1] = 0;
        }
      }
    }
  }

  __device__ void Add(const Accumulator<kM, kDim / 8>& dq) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = TileRow(m, r) % kBlock;
        if (token >= State().Tokens(State().block)) continue;
        const int64_t row = State().first_row + token * p_.heads + TileRow(m, r) / kBlock;
        auto* to = reinterpret_cast<float2*>(p_.dq + row * p_.dim);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          if (8 * n >= p_.dim) break;
          float2 sum = to[4 * n + lane % 4];
          sum.x = fmaf(p_.scale, dq.at[m][n][2 * r], sum.x);
          sum.y = fmaf(p_.scale, dq.at[m][n][2 * r + 1], sum.y);
          to[4 * n + lane % 4] = sum;
        }
      }
    }
  }

  const BackwardProblem& p_;
  const Tiles<kDim> tiles_;
  float lse_[kM][2], delta_[kM][2];  // of this thread's rows; of softmax
};

template <int kDim, int kHeads, Normalization kNormalization>
__global__
__launch_bounds__(kThreads, (QueryGradientShape<kDim, kHeads>::kResident)) void QueryGradientKernel(
    const BackwardProblem problem, const TileGrid grid) {
  LONGSPAN_DYNAMIC_SHARED(shared);
  const BlockTask task = problem.mask.rows.tasks[blockIdx.x / grid.tiles];
  const int64_t head = task.kv_head * problem.group + grid.first_head +
                       static_cast<int64_t>(blockIdx.x % grid.tiles) * kHeads;
  QueryGradientTile<kDim, kHeads, kNormalization>(problem, shared).Run(task, head);
}

template <int kDim, int kHeads, Normalization kNormalization>
void LaunchQueryGradient(cuda::Runtime& runtime, const BackwardProblem& problem,
                         const TileGrid& grid) {
  cuda::Launch(runtime, "AttentionBackward mma_bf16 dq",
               QueryGradientKernel<kDim, kHeads, kNormalization>,
               {dim3(cuda::GridSize(problem.mask.rows.busy_tasks * grid.tiles)), dim3(kThreads),
                QueryGradientShape<kDim, kHeads>::kBytes},
               problem, grid);
}

}  // namespace longspan::ops::mma
