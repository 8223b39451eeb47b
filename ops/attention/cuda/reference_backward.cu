// Two passes, each result owned by one block: dQ by query blocks and heads over rows; dK and dV by
// key blocks over columns, with the query heads of the group inside. Scores are computed again in
// both.
#include <cmath>

#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/cuda/reference_softmax.cuh"
#include "ops/core/cuda/launch.h"

namespace longspan::ops::reference_cuda {
namespace {

// Blocks that a multiprocessor is to hold at once.
template <int kDim>
constexpr int kBlocks = kDim <= 32 ? 2 : 1;

struct BackwardProblem {
  Problem problem;
  const void* d_out;
  bool d_out_bf16;
  const float *lse, *delta;  // of softmax
  const float* dlse;         // of softmax; may be null
  float *dq, *dk, *dv;
  DeviceKvTable grads;
};

// How the rows of a thread turn a score, in units of log2, into its weight p and the gradient dp of
// p into ds, that of the score.
template <Normalization kNormalization>
struct Rows;

// ds = p (dp - delta + dlse)
template <>
struct Rows<Normalization::kSoftmax> {
  float lse[kOwn], delta[kOwn];  // in units of log2; less dlse
  __device__ Rows(const BackwardProblem& args, int64_t token, int64_t head, int queries) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = ThreadY() * kOwn + i;
      const int64_t at = (token + (row < queries ? row : 0)) * args.problem.heads + head;
      lse[i] = args.lse[at] * kLog2E;
      delta[i] = args.delta[at] - (args.dlse != nullptr ? args.dlse[at] : 0.0f);
    }
  }
  __device__ void Turn(int i, float& score, float& gradient) const {
    score = exp2f(score - lse[i]);
    gradient = score * (gradient - delta[i]);
  }
};

// ds = p (1 - p) dp
template <>
struct Rows<Normalization::kSigmoid> {
  float bias;
  __device__ Rows(const BackwardProblem& args, int64_t, int64_t, int)
      : bias(args.problem.bias_log2) {}
  __device__ void Turn(int, float& score, float& gradient) const {
    const Logistic<float> weight = SigmoidWeight(score + bias);
    score = weight.p;
    gradient *= weight.slope;
  }
};

// Weights p and score gradients ds of a tile. Hidden pairs are exactly 0, whatever their scores and
// rows hold.
struct TileGradient {
  float p[kOwn][kOwn] = {}, ds[kOwn][kOwn] = {};
  template <Normalization kNormalization>
  __device__ TileGradient(const Problem& problem, const TilePair& pair, const RowBlock& q,
                          const RowBlock& k, const RowBlock& d_out, const RowBlock& v,
                          const Rows<kNormalization>& rows, Shared& shared) {
    ScoreProduct(q, k, shared, p);
    ScoreProduct(d_out, v, shared, ds);
    const uint32_t visible = VisiblePairs(problem.mask, pair);
    const float scale = problem.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const bool sees = (visible >> (i * kOwn + j) & 1u) != 0;
        float weight = scale * p[i][j], gradient = ds[i][j];
        rows.Turn(i, weight, gradient);
        p[i][j] = sees ? weight : 0.0f;
        ds[i][j] = sees ? gradient : 0.0f;
      }
    }
  }
};

template <int kDim, Normalization kNormalization>
__global__ void __launch_bounds__(kThreads, kBlocks<kDim>)
    QueryGradientKernel(BackwardProblem args) {
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
  const RowBlock d_out = p.Queries(args.d_out, args.d_out_bf16, token, head, queries);
  const Rows<kNormalization> rows(args, token, head, queries);

  Accumulator<kDim> dq;
  for (EntryCursor entry = mask.Entries(mask.rows, task); !entry.done(); entry.Next()) {
    const RowBlock k = p.Keys(p.k, task.kv_head, entry.block());
    const RowBlock v = p.Keys(p.v, task.kv_head, entry.block());
    const TilePair pair{task.kv_head, mask.FirstToken(id), mask.FirstToken(entry.block()), queries,
                        k.rows,       entry.partial()};
    const TileGradient tile(p, pair, q, k, d_out, v, rows, shared);
    StoreByKey(tile.ds, shared);
    dq.AddProduct(k, shared);
  }
  dq.ForEach(queries, p.dim, [&](int row, int d, float value) {
    args.dq[((token + row) * p.heads + head) * p.dim + d] += p.scale * value;
  });
}

template <int kDim, Normalization kNormalization>
__global__ void __launch_bounds__(kThreads, kBlocks<kDim>) KeyGradientKernel(BackwardProblem args) {
  LONGSPAN_DYNAMIC_SHARED(dynamic);
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  const Problem& p = args.problem;
  const DeviceMask& mask = p.mask;
  const BlockTask task = mask.columns.tasks[blockIdx.x];
  const int32_t id = mask.columns.ids[task.index];
  const RowBlock k = p.Keys(p.k, task.kv_head, id), v = p.Keys(p.v, task.kv_head, id);

  Accumulator<kDim> dk, dv;
  for (EntryCursor entry = mask.Entries(mask.columns, task); !entry.done(); entry.Next()) {
    const int64_t token = mask.QueryBegin(entry.block());
    const int queries = mask.Tokens(entry.block());
    const TilePair pair{
        task.kv_head,   mask.FirstToken(entry.block()), mask.FirstToken(id), queries, k.rows,
        entry.partial()};
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t head = task.kv_head * p.group + g;
      const RowBlock q = p.Queries(p.q, p.bf16, token, head, queries);
      const RowBlock d_out = p.Queries(args.d_out, args.d_out_bf16, token, head, queries);
      const Rows<kNormalization> rows(args, token, head, queries);
      const TileGradient tile(p, pair, q, k, d_out, v, rows, shared);
      StoreByQuery(tile.p, shared);
      dv.AddProduct(d_out, shared);
      StoreByQuery(tile.ds, shared);
      dk.AddProduct(q, shared);
    }
  }
  const int64_t out = args.grads.Offset(task.kv_head, id);
  dk.ForEach(k.rows, p.dim, [&](int row, int d, float value) {
    args.dk[out + row * args.grads.token_stride + d] += p.scale * value;
  });
  dv.ForEach(k.rows, p.dim, [&](int row, int d, float value) {
    args.dv[out + row * args.grads.token_stride + d] += value;
  });
}

}  // namespace
}  // namespace longspan::ops::reference_cuda

namespace longspan::ops::internal {

void ReferenceCudaBackward(Context& ctx, const BackwardArgs& args) {
  namespace reference = reference_cuda;
  if (args.mask.empty()) return;  // and the tensors of keys may be undefined
  const auto read = [](const Tensor& t) -> const float* {
    return t.defined() ? t.data<float>() : nullptr;
  };
  const reference::BackwardProblem problem{reference::MakeProblem(ctx, args),
                                           args.d_out.raw(),
                                           args.d_out.dtype() == DType::kBF16,
                                           read(args.lse),
                                           read(args.delta),
                                           read(args.dlse),
                                           args.dq.data<float>(),
                                           args.dkv.dk.data<float>(),
                                           args.dkv.dv.data<float>(),
                                           OnDevice(ctx, *args.dkv.table)};
  const auto shape = [](int64_t blocks) {
    return cuda::LaunchShape{dim3(cuda::GridSize(blocks)), dim3(reference::kThreads),
                             sizeof(reference::Shared)};
  };
  const DeviceMask& mask = problem.problem.mask;
  const cuda::LaunchShape rows = shape(mask.rows.busy_tasks * problem.problem.group),
                          columns = shape(mask.columns.busy_tasks);
  DispatchNormalization(args.normalization, [&]<Normalization kNormalization>() {
    reference::DispatchDim(args.kv.head_dim, [&]<int kDim>() {
      cuda::Launch(ctx.cuda(), "AttentionBackward dQ(reference_cuda)",
                   reference::QueryGradientKernel<kDim, kNormalization>, rows, problem);
      cuda::Launch(ctx.cuda(), "AttentionBackward dKdV(reference_cuda)",
                   reference::KeyGradientKernel<kDim, kNormalization>, columns, problem);
    });
  });
}

}  // namespace longspan::ops::internal
