// A block per (segment of rows, query head): its rows continue from their o and lse with the keys
// of the blocks they chose, block by block in ascending order.
#include <algorithm>

#include "ops/attention/cuda/routed_cuda.h"
#include "ops/attention/cuda/routed_problem.cuh"
#include "ops/core/cuda/launch.h"

namespace longspan::ops::reference_cuda {
namespace {

template <int kDim>
constexpr int kBlocks = kDim <= 64 ? 2 : 1;  // that a multiprocessor is to hold at once

struct RoutedForwardProblem {
  RoutedProblem problem;
  float *o, *lse;
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks<kDim>)
    RoutedForwardKernel(RoutedForwardProblem args) {
  LONGSPAN_DYNAMIC_SHARED(dynamic);
  RoutedShared& shared = *reinterpret_cast<RoutedShared*>(dynamic);
  const RoutedProblem& p = args.problem;
  const RoutedProblem::Share own = p.RowsOf(blockIdx.x);
  const float scale = p.scale * kLog2E;
  p.ForEachTile(own.segment, own.head, [&](int64_t block, int64_t at, int rows) {
    p.LoadNumbers(at, rows, own.head, shared.numbers);
    const GatheredRows q = p.Gathered(p.q, p.bf16, shared.numbers, rows);
    Accumulator<kDim> o;
    float top[kOwn], sum[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = ThreadY() * kOwn + i;
      top[i] = row < rows ? args.lse[shared.numbers[row]] * kLog2E : -INFINITY;
      sum[i] = row < rows ? 1.0f : 0.0f;
    }
    o.ForEachOwn(rows, p.dim, [&](int row, int d, float& value) {
      value = args.o[shared.numbers[row] * p.dim + d];
    });
    const int64_t tokens = p.TokensOf(block),
                  keys_at = p.keys.Offset(own.kv_head, static_cast<int32_t>(block));
    for (int64_t first = 0; first < tokens; first += kTile) {
      const int keys = static_cast<int>(std::min<int64_t>(kTile, tokens - first));
      float s[kOwn][kOwn] = {};
      ScoreProduct(q, p.Keys(p.k, keys_at, first, keys), shared.tiles, s);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          s[i][j] = ThreadX() * kOwn + j < keys ? s[i][j] * scale : -INFINITY;
        }
      }
      Softmax(s, top, sum, o);
      StoreByKey(s, shared.tiles);
      o.AddProduct(p.Keys(p.v, keys_at, first, keys), shared.tiles);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = ThreadY() * kOwn + i;
      if (ThreadX() == 0 && row < rows) {
        args.lse[shared.numbers[row]] =
            static_cast<float>(kLn2 * static_cast<double>(top[i])) + logf(sum[i]);
      }
      o.ScaleRow(i, row < rows ? 1.0f / sum[i] : 0.0f);
    }
    o.ForEach(rows, p.dim, [&](int row, int d, float value) {
      args.o[shared.numbers[row] * p.dim + d] = value;
    });
    __syncthreads();  // the next tile may hold the same rows
  });
}

}  // namespace
}  // namespace longspan::ops::reference_cuda

namespace longspan::ops::internal {

void RoutedForwardCuda(Context& ctx, const RoutedForwardArgs& args) {
  namespace reference = reference_cuda;
  const reference::RoutedForwardProblem problem{reference::MakeRoutedProblem(ctx, args),
                                                args.o.data<float>(), args.lse.data<float>()};
  const int64_t blocks = problem.problem.segments() * problem.problem.heads;
  reference::DispatchDim(args.q.dim(2), [&]<int kDim>() {
    cuda::Launch(ctx.cuda(), "MobaForward(reference_cuda)", reference::RoutedForwardKernel<kDim>,
                 reference::RoutedLaunch(blocks), problem);
  });
}

}  // namespace longspan::ops::internal
