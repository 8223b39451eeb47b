// A block per (query block, query head): online softmax over the block's entries.
#include <cmath>

#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/cuda/reference_tile.cuh"
#include "ops/core/cuda/launch.h"

namespace longspan::ops::reference_cuda {
namespace {

// Blocks that a multiprocessor is to hold at once.
template <int kDim>
constexpr int kBlocks = kDim <= 64 ? 2 : 1;

struct ForwardProblem {
  Problem problem;
  void* o;
  bool o_bf16;
  float* lse;
};

// Maximum and sum over the 16 threads of a row.
__device__ float RowMax(float x) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}
__device__ float RowSum(float x) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// One step of the online softmax: scores (log2 units) become probabilities against the raised
// maximum, and what was summed before is scaled down. A row that has seen nothing keeps -inf. A NaN
// score is no maximum but reaches the sum.
template <int kDim>
__device__ void Softmax(float (&s)[kOwn][kOwn], float (&top)[kOwn], float (&sum)[kOwn],
                        Accumulator<kDim>& o) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    float highest = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
    highest = fmaxf(top[i], RowMax(highest));
    const float base = highest == -INFINITY ? 0.0f : highest;
    const float rescale = exp2f(top[i] - base);
    float added = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      s[i][j] = exp2f(s[i][j] - base);
      added += s[i][j];
    }
    sum[i] = sum[i] * rescale + RowSum(added);
    top[i] = highest;
    o.ScaleRow(i, rescale);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks<kDim>) ForwardKernel(ForwardProblem args) {
  LONGSPAN_DYNAMIC_SHARED(dynamic);
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  const Problem& p = args.problem;
  const DeviceMask& mask = p.mask;
  const BlockTask task = mask.rows.tasks[blockIdx.x / p.group];
  const int64_t head = task.kv_head * p.group + blockIdx.x % p.group;
  const int64_t token = mask.rows.token_begin[task.index];
  const int32_t id = mask.rows.ids[task.index];
  const int queries = mask.Tokens(id);
  const RowBlock q = p.Queries(p.q, p.bf16, token, head, queries);
  const float scale = p.scale * kLog2E;

  Accumulator<kDim> o;
  float top[kOwn], sum[kOwn] = {};
  for (float& t : top) t = -INFINITY;
  for (EntryCursor entry = mask.Entries(mask.rows, task); !entry.done(); entry.Next()) {
    const RowBlock k = p.Keys(p.k, task.kv_head, entry.block());
    const TilePair pair{task.kv_head, mask.FirstToken(id), mask.FirstToken(entry.block()), queries,
                        k.rows,       entry.partial()};
    float s[kOwn][kOwn] = {};
    ScoreProduct(q, k, shared, s);
    const uint32_t visible = VisiblePairs(mask, pair);
#pragma unroll
    for (int n = 0; n < kOwn * kOwn; ++n) {
      float& x = s[n / kOwn][n % kOwn];
      x = (visible >> n & 1u) != 0 ? x * scale : -INFINITY;
    }
    Softmax(s, top, sum, o);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {  // [key][query]
      *reinterpret_cast<float4*>(shared.tile + (ThreadX() * kOwn + j) * kLd + ThreadY() * kOwn) =
          make_float4(s[0][j], s[1][j], s[2][j], s[3][j]);
    }
    o.AddProduct(p.Keys(p.v, task.kv_head, entry.block()), shared);
  }

  // A NaN score is no empty row.
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const bool empty = sum[i] == 0;
    const int row = ThreadY() * kOwn + i;
    if (ThreadX() == 0 && row < queries) {
      args.lse[(token + row) * p.heads + head] =
          empty ? -INFINITY : static_cast<float>(kLn2 * static_cast<double>(top[i])) + logf(sum[i]);
    }
    o.ScaleRow(i, empty ? 0.0f : 1.0f / sum[i]);
  }
  o.ForEach(queries, p.dim, [&](int row, int d, float value) {
    const int64_t at = ((token + row) * p.heads + head) * p.dim + d;
    if (args.o_bf16) {
      static_cast<BF16*>(args.o)[at] = BF16(value);
    } else {
      static_cast<float*>(args.o)[at] = value;
    }
  });
}

}  // namespace
}  // namespace longspan::ops::reference_cuda

namespace longspan::ops::internal {

void ReferenceCudaForward(Context& ctx, const ForwardArgs& args) {
  namespace reference = reference_cuda;
  const reference::ForwardProblem problem{
      reference::MakeProblem(ctx, args.q, args.kv, args.mask, args.scale), args.o.raw(),
      args.o.dtype() == DType::kBF16, args.lse.data<float>()};
  const int64_t blocks = problem.problem.mask.rows.task_count * problem.problem.group;
  reference::DispatchDim(args.kv.head_dim, [&]<int kDim>() {
    cuda::Launch(
        ctx.cuda(), "AttentionForward(reference_cuda)", reference::ForwardKernel<kDim>,
        {dim3(cuda::GridSize(blocks)), dim3(reference::kThreads), sizeof(reference::Shared)},
        problem);
  });
}

}  // namespace longspan::ops::internal
