// Two passes, each result owned by one block: dQ by segments of rows and heads; dK and dV by 64
// keys of a block and kv head, over the lists of the group's heads. Scores are computed again in
// both.
#include <algorithm>

#include "ops/attention/cuda/routed_cuda.h"
#include "ops/attention/cuda/routed_problem.cuh"
#include "ops/core/cuda/launch.h"

namespace longspan::ops::reference_cuda {
namespace {

template <int kDim>
constexpr int kBlocks = kDim <= 32 ? 2 : 1;  // that a multiprocessor is to hold at once

struct RoutedBackwardProblem {
  RoutedProblem problem;
  const void* d_out;
  bool d_out_bf16;
  const float *lse, *delta;
  float* dq;       // of the first pass
  float *dk, *dv;  // and of the second, with the table of both
  DeviceKvTable grads;
  int64_t pieces;  // of 64 keys, in the longest block
};

// Probabilities p and score gradients ds = p (dp - delta) of gathered rows and up to 64 keys; 0
// where there is no row or key.
struct RoutedGradient {
  float p[kOwn][kOwn] = {}, ds[kOwn][kOwn] = {};
  __device__ RoutedGradient(const RoutedBackwardProblem& args, const GatheredRows& q,
                            const GatheredRows& d_out, const RowBlock& k, const RowBlock& v,
                            Shared& shared) {
    ScoreProduct(q, k, shared, p);
    ScoreProduct(d_out, v, shared, ds);
    const float scale = args.problem.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = ThreadY() * kOwn + i;
      const bool is_row = row < q.count;
      const int64_t number = q.numbers[is_row ? row : 0];
      const float lse = args.lse[number] * kLog2E, delta = args.delta[number];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const bool exists = is_row && ThreadX() * kOwn + j < k.rows;
        p[i][j] = exists ? exp2f(scale * p[i][j] - lse) : 0.0f;
        ds[i][j] = exists ? p[i][j] * (ds[i][j] - delta) : 0.0f;
      }
    }
  }
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks<kDim>)
    RoutedQueryGradientKernel(RoutedBackwardProblem args) {
  LONGSPAN_DYNAMIC_SHARED(dynamic);
  RoutedShared& shared = *reinterpret_cast<RoutedShared*>(dynamic);
  const RoutedProblem& p = args.problem;
  const RoutedProblem::Share own = p.RowsOf(blockIdx.x);
  p.ForEachTile(own.segment, own.head, [&](int64_t block, int64_t at, int rows) {
    p.LoadNumbers(at, rows, own.head, shared.numbers);
    const GatheredRows q = p.Gathered(p.q, p.bf16, shared.numbers, rows);
    const GatheredRows d_out = p.Gathered(args.d_out, args.d_out_bf16, shared.numbers, rows);
    Accumulator<kDim> dq;
    const int64_t tokens = p.TokensOf(block),
                  keys_at = p.keys.Offset(own.kv_head, static_cast<int32_t>(block));
    for (int64_t first = 0; first < tokens; first += kTile) {
      const int keys = static_cast<int>(std::min<int64_t>(kTile, tokens - first));
      const RowBlock k = p.Keys(p.k, keys_at, first, keys);
      const RoutedGradient tile(args, q, d_out, k, p.Keys(p.v, keys_at, first, keys), shared.tiles);
      StoreByKey(tile.ds, shared.tiles);
      dq.AddProduct(k, shared.tiles);
    }
    dq.ForEach(rows, p.dim, [&](int row, int d, float value) {
      args.dq[shared.numbers[row] * p.dim + d] += p.scale * value;
    });
    __syncthreads();  // the next tile may hold the same rows
  });
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks<kDim>)
    RoutedKeyGradientKernel(RoutedBackwardProblem args) {
  LONGSPAN_DYNAMIC_SHARED(dynamic);
  RoutedShared& shared = *reinterpret_cast<RoutedShared*>(dynamic);
  const RoutedProblem& p = args.problem;
  const int64_t kv_head = blockIdx.x % p.kv_heads;
  const int64_t block = blockIdx.x / p.kv_heads / args.pieces;
  const int64_t piece = blockIdx.x / p.kv_heads % args.pieces;
  const int64_t first = piece * kTile, tokens = p.TokensOf(block);
  const int64_t first_list = block * p.heads + kv_head * p.group;
  if (first >= tokens || p.offsets[first_list] == p.offsets[first_list + p.group]) return;
  const int keys = static_cast<int>(std::min<int64_t>(kTile, tokens - first));
  const int64_t keys_at = p.keys.Offset(kv_head, static_cast<int32_t>(block));
  const RowBlock k = p.Keys(p.k, keys_at, first, keys), v = p.Keys(p.v, keys_at, first, keys);

  Accumulator<kDim> dk, dv;
  for (int64_t g = 0; g < p.group; ++g) {
    const int64_t list_end = p.offsets[first_list + g + 1];
    for (int64_t at = p.offsets[first_list + g]; at < list_end; at += kTile) {
      const int rows = static_cast<int>(std::min<int64_t>(kTile, list_end - at));
      p.LoadNumbers(at, rows, kv_head * p.group + g, shared.numbers);
      const GatheredRows q = p.Gathered(p.q, p.bf16, shared.numbers, rows);
      const GatheredRows d_out = p.Gathered(args.d_out, args.d_out_bf16, shared.numbers, rows);
      const RoutedGradient tile(args, q, d_out, k, v, shared.tiles);
      StoreByQuery(tile.p, shared.tiles);
      dv.AddProduct(d_out, shared.tiles);
      StoreByQuery(tile.ds, shared.tiles);
      dk.AddProduct(q, shared.tiles);
    }
  }
  const int64_t stride = args.grads.token_stride;
  const int64_t to = args.grads.Offset(kv_head, static_cast<int32_t>(block)) + first * stride;
  dk.ForEach(keys, p.dim, [&](int row, int d, float value) {
    args.dk[to + row * stride + d] += p.scale * value;
  });
  dv.ForEach(keys, p.dim,
             [&](int row, int d, float value) { args.dv[to + row * stride + d] += value; });
}

RoutedBackwardProblem MakeBackwardProblem(Context& ctx, const RoutedBackwardArgs& args) {
  RoutedBackwardProblem problem{};
  problem.problem = MakeRoutedProblem(ctx, args);
  problem.d_out = args.d_out.raw();
  problem.d_out_bf16 = args.d_out.dtype() == DType::kBF16;
  problem.lse = args.lse.data<float>();
  problem.delta = args.delta.data<float>();
  return problem;
}

}  // namespace
}  // namespace longspan::ops::reference_cuda

namespace longspan::ops::internal {

void RoutedQueryGradientCuda(Context& ctx, const RoutedBackwardArgs& args, Tensor& dq) {
  namespace reference = reference_cuda;
  reference::RoutedBackwardProblem problem = reference::MakeBackwardProblem(ctx, args);
  problem.dq = dq.data<float>();
  const reference::RoutedProblem& p = problem.problem;
  const cuda::LaunchShape queries = reference::RoutedLaunch(p.segments() * p.heads);
  reference::DispatchDim(args.q.dim(2), [&]<int kDim>() {
    cuda::Launch(ctx.cuda(), "MobaBackward dQ(reference_cuda)",
                 reference::RoutedQueryGradientKernel<kDim>, queries, problem);
  });
}

void RoutedKeyGradientCuda(Context& ctx, const RoutedBackwardArgs& args, const KvGradView& dkv) {
  namespace reference = reference_cuda;
  int64_t longest = 0;
  for (int64_t b = 0; b < args.blocks.count(); ++b) {
    longest = std::max(longest, args.blocks.TokensOf(b));
  }
  reference::RoutedBackwardProblem problem = reference::MakeBackwardProblem(ctx, args);
  problem.dk = dkv.dk.data<float>();
  problem.dv = dkv.dv.data<float>();
  problem.grads = OnDevice(ctx, *dkv.table);
  problem.pieces = (longest + reference::kTile - 1) / reference::kTile;
  const cuda::LaunchShape keys =
      reference::RoutedLaunch(args.blocks.count() * problem.pieces * problem.problem.kv_heads);
  reference::DispatchDim(args.q.dim(2), [&]<int kDim>() {
    cuda::Launch(ctx.cuda(), "MobaBackward dKdV(reference_cuda)",
                 reference::RoutedKeyGradientKernel<kDim>, keys, problem);
  });
}

}  // namespace longspan::ops::internal
