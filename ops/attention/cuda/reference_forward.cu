// A block per (query block, query head): online softmax, or a plain sum of sigmoid weights, over
// the block's entries.
#include <cmath>

#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/cuda/reference_softmax.cuh"
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
  float* lse;  // of softmax
};

template <int kDim, Normalization kNormalization>
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
  constexpr bool kSoftmax = kNormalization == Normalization::kSoftmax;

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
      const bool sees = (visible >> n & 1u) != 0;
      if constexpr (kSoftmax) {
        x = sees ? x * scale : -INFINITY;
      } else {
        x = sees ? SigmoidWeight(x * scale + p.bias_log2).p : 0.0f;
      }
    }
    if constexpr (kSoftmax) Softmax(s, top, sum, o);
    StoreByKey(s, shared);
    o.AddProduct(p.Keys(p.v, task.kv_head, entry.block()), shared);
  }

  if constexpr (kSoftmax) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool empty = sum[i] == 0;  // which a row with a NaN score is not
      const int row = ThreadY() * kOwn + i;
      if (ThreadX() == 0 && row < queries) {
        const auto maximum = static_cast<float>(kLn2 * static_cast<double>(top[i]));
        args.lse[(token + row) * p.heads + head] = empty ? -INFINITY : maximum + logf(sum[i]);
      }
      o.ScaleRow(i, empty ? 0.0f : 1.0f / sum[i]);
    }
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
  const reference::ForwardProblem problem{reference::MakeProblem(ctx, args), args.o.raw(),
                                          args.o.dtype() == DType::kBF16,
                                          args.lse.defined() ? args.lse.data<float>() : nullptr};
  const int64_t blocks = problem.problem.mask.rows.task_count * problem.problem.group;
  DispatchNormalization(args.normalization, [&]<Normalization kNormalization>() {
    reference::DispatchDim(args.kv.head_dim, [&]<int kDim>() {
      cuda::Launch(
          ctx.cuda(), "AttentionForward(reference_cuda)",
          reference::ForwardKernel<kDim, kNormalization>,
          {dim3(cuda::GridSize(blocks)), dim3(reference::kThreads), sizeof(reference::Shared)},
          problem);
    });
  });
}

}  // namespace longspan::ops::internal
