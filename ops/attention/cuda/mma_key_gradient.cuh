#pragma once
#include "ops/attention/cuda/mma_arguments.cuh"
#include "ops/attention/cuda/mma_normalization.cuh"
#include "ops/attention/cuda/mma_tile.cuh"
#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/launch.h"

// dv += p^T do, dk += scale * ds^T q: tasks over key blocks; the query heads of the group pass
// through one after another, so that each sum has one owner and one order.
namespace longspan::ops::mma {

template <int kDim, Normalization kNormalization>
class KeyGradientTile {
 public:
  using Shape = KeyGradientShape<kDim>;
  static constexpr int kQueries = Shape::kStepQueries;  // scores held at a time
  using Scores = Accumulator<1, kQueries / 8>;          // rows: keys of this warp
  using Gradient = Accumulator<1, Shape::kColumns / 8>;

  __device__ KeyGradientTile(const BackwardProblem& problem, std::byte* shared)
      : p_(problem), tiles_{shared} {}

  __device__ __forceinline__ void Run(BlockTask task, int part) {
    State().Begin(p_.mask, p_.mask.columns, task, 0);
    __syncthreads();
    int32_t now = State().StepAt(0);
    if (now < 0) return;
    LoadKeys();
    LoadQueries(Shape::kQ, p_.q, now, 0);
    if constexpr (kNormalization == kSoftmax) LoadStatistics(0, now, 0);
    cuda::ptx::CopyAsyncCommit();
    LoadQueries(Shape::kDOut, p_.d_out, now, 0);
    cuda::ptx::CopyAsyncCommit();
    const int first_pair = part * (Shape::kColumns / 16);
    Gradient dk, dv;
    dk.Clear();
    dv.Clear();
    int turn = 0;  // of the two buffers
    for (int index = 0; now >= 0;) {
      if (head_ == 0) {
        State().Prepare(index + 1);
        if (Masked(now)) {
          FillMask(tiles_.shared + Shape::kMask, p_.mask.rule, State(), now / 2, State().block);
        }
      }
      const bool masked = Masked(now);
      const int parity = Parity(now);
      cuda::ptx::CopyAsyncWait<0>();
      __syncthreads();
      const bool same = head_ + 1 < p_.group;  // the next step takes the next head
      const int32_t next = same ? now : State().StepAt(index + 1);
      head_ = same ? head_ + 1 : 0;
      index += !same;
      LoadQueries(Shape::kQ + (1 - turn) * TileBytes<kDim>(), p_.q, next, head_);
      if constexpr (kNormalization == kSoftmax) LoadStatistics(1 - turn, next, head_);
      if constexpr (Shape::kDOuts == 2) {
        LoadQueries(Shape::kDOut + (1 - turn) * TileBytes<kDim>(), p_.d_out, next, head_);
      }
      cuda::ptx::CopyAsyncCommit();
#pragma unroll 1
      for (int first = 0; first < kBlock; first += kQueries) {
        const int rows = first * kDim * 2;  // bytes
        const int q = Shape::kQ + turn * TileBytes<kDim>() + rows;
        const int d_out = Shape::kDOut + (Shape::kDOuts - 1) * turn * TileBytes<kDim>() + rows;
        Scores s, dp;
        MultiplyRows<kDim>(s, tiles_, Shape::kK + WarpRow() * kDim * 2, q);
        MultiplyRows<kDim>(dp, tiles_, Shape::kV + WarpRow() * kDim * 2, d_out);
        Gradients(s, dp, turn, first + parity);
        if (masked) Hide(s, dp, first);
        const Weights<1, kQueries / 16> p(s), ds(dp);
        AddProduct<kDim>(dv, tiles_, p, d_out, first_pair);
        if (first + kQueries == kBlock) {  // the mask, the listed steps and one dO are free
          __syncthreads();
          if constexpr (Shape::kDOuts == 1) {
            LoadQueries(Shape::kDOut, p_.d_out, next, head_);
            cuda::ptx::CopyAsyncCommit();
          }
        }
        AddProduct<kDim>(dk, tiles_, ds, q, first_pair);
      }
      turn = 1 - turn;
      now = next;
    }
    Add(p_.dk, dk, p_.scale, part);
    Add(p_.dv, dv, 1.0f, part);
  }

 private:
  __device__ TaskState& State() const {
    return *reinterpret_cast<TaskState*>(tiles_.shared + Shape::kTask);
  }
  __device__ int WarpRow() const { return static_cast<int>(threadIdx.x) / 32 * 16; }
  __device__ bool Masked(int32_t step) const {
    return step % 2 != 0 || State().Tokens(step / 2) < kBlock;
  }
  // Statistics are copied in pairs: the first row is the second of a pair where its index is odd.
  __device__ int Parity(int32_t step) const {
    return static_cast<int>(p_.mask.QueryBegin(step / 2) % 2);
  }

  // These three without a commit.
  __device__ void LoadKeys() {
    const int64_t offset = p_.table.Offset(State().kv_head, State().block);
    const int tokens = State().Tokens(State().block);
    CopyTileAsync<kDim>(tiles_.shared + Shape::kK, p_.k + offset, p_.kv_stride, tokens, p_.dim);
    CopyTileAsync<kDim>(tiles_.shared + Shape::kV, p_.v + offset, p_.kv_stride, tokens, p_.dim);
  }
  __device__ __forceinline__ void LoadQueries(int tile, const BF16* from, int32_t step, int head) {
    if (step < 0) return;
    const int64_t first = p_.mask.QueryBegin(step / 2) * p_.heads +
                          State().kv_head * static_cast<int64_t>(p_.group) + head;
    CopyTileAsync<kDim>(tiles_.shared + tile, from + first * p_.dim, p_.q_stride,
                        State().Tokens(step / 2), p_.dim);
  }
  __device__ __forceinline__ void LoadStatistics(int turn, int32_t step, int head) {
    const int pair = static_cast<int>(threadIdx.x);
    if (step < 0 || pair >= kStatisticsBytes / 16) return;
    const int64_t first =
        (State().kv_head * static_cast<int64_t>(p_.group) + head) * p_.statistics_stride +
        p_.mask.QueryBegin(step / 2) / 2 * 2;
    const bool inside = 2 * pair <= State().Tokens(step / 2);
    cuda::ptx::CopyAsync16(tiles_.shared + Shape::kStatistics + turn * kStatisticsBytes + pair * 16,
                           p_.statistics + first + (inside ? 2 * pair : 0), inside);
  }

  // s becomes p and dp becomes ds; columns are queries. Of softmax p = exp2(scale s - lse) and ds =
  // p (dp - delta); of sigmoid ds = p (1 - p) dp.
  __device__ __forceinline__ void Gradients(Scores& s, Scores& dp, int turn, int first) const {
    const auto* rows = reinterpret_cast<const float2*>(tiles_.shared + Shape::kStatistics +
                                                       turn * kStatisticsBytes) +
                       first + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        if constexpr (kNormalization == kSoftmax) {
          const float2 row = rows[8 * n + column];
#pragma unroll
          for (int e = column; e < 4; e += 2) {
            const float p = cuda::ptx::Exp2(fmaf(s.at[0][n][e], p_.scale_log2, -row.x));
            s.at[0][n][e] = p;
            dp.at[0][n][e] = p * (dp.at[0][n][e] - row.y);
          }
        } else {
#pragma unroll
          for (int e = column; e < 4; e += 2) {
            const Logistic<float> weight =
                SigmoidWeight(fmaf(s.at[0][n][e], p_.scale_log2, p_.bias_log2));
            s.at[0][n][e] = weight.p;
            dp.at[0][n][e] *= weight.slope;
          }
        }
      }
    }
  }

  // Hidden weights and gradients become 0, and so do those of rows behind the last query.
  __device__ __forceinline__ void Hide(Scores& p, Scores& ds, int first) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, key = WarpRow() + lane / 4;
    const auto* words = reinterpret_cast<const uint32_t*>(tiles_.shared + Shape::kMask) +
                        2 * (first + lane % 4 * 2) + key / 32;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (words[2 * (8 * n + e % 2)] >> (key % 32 + e / 2 * 8) & 1) continue;
        p.at[0][n][e] = 0;
        ds.at[0][n][e] = 0;
      }
    }
  }

  // Rows of the storage may begin anywhere.
  __device__ void Add(float* to, const Gradient& from, float scale, int part) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t offset = p_.gradient_table.Offset(State().kv_head, State().block);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = WarpRow() + 8 * r + lane / 4;
      if (key >= State().Tokens(State().block)) continue;
      float* row = to + offset + key * p_.gradient_table.token_stride;
#pragma unroll
      for (int n = 0; n < Shape::kColumns / 8; ++n) {
        const int column = part * Shape::kColumns + 8 * n + lane % 4 * 2;
        if (column >= p_.dim) break;
        row[column] = fmaf(scale, from.at[0][n][2 * r], row[column]);
        row[column + 1] = fmaf(scale, from.at[0][n][2 * r + 1], row[column + 1]);
      }
    }
  }

  const BackwardProblem& p_;
  const Tiles<kDim> tiles_;
  int head_ = 0;  // of the group
};

template <int kDim, Normalization kNormalization>
__global__ __launch_bounds__(kThreads, KeyGradientShape<kDim>::kResident) void KeyGradientKernel(
    const BackwardProblem problem) {
  LONGSPAN_DYNAMIC_SHARED(shared);
  KeyGradientTile<kDim, kNormalization>(problem, shared)
      .Run(problem.mask.columns.tasks[blockIdx.x], static_cast<int>(blockIdx.y));
}

template <int kDim, Normalization kNormalization>
void LaunchKeyGradient(cuda::Runtime& runtime, const BackwardProblem& problem) {
  using Shape = KeyGradientShape<kDim>;
  cuda::Launch(runtime, "AttentionBackward mma_bf16 dk dv", KeyGradientKernel<kDim, kNormalization>,
               {dim3(cuda::GridSize(problem.mask.columns.busy_tasks), Shape::kParts),
                dim3(kThreads), Shape::kBytes},
               problem);
}

}  // namespace longspan::ops::mma
