#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/attention/cpu/block_maxima.h"
#include "ops/attention/cpu/blocked.h"
#include "ops/attention/token_sets.h"
#include "ops/core/parallel_for.h"

namespace longspan::ops::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Running state of one query head of a task: queries are the lanes of q_lanes, maximum and sum.
struct HeadState {
  float* q_lanes;  // [dim][64]
  float* o;        // [64][ld], of softmax not yet divided by sum
  float* maximum;  // [64], in units of log2; of softmax, as sum
  float* sum;      // [64]
};
int64_t HeadFloats(const BlockedShape& shape) { return shape.lanes() + shape.packed() + 2 * 64; }
int64_t WorkerFloats(const BlockedShape& shape) {
  return shape.group * HeadFloats(shape) + 2 * shape.packed() + BlockedShape::kTile + 64;
}

class ForwardTask {
 public:
  ForwardTask(const BlockKernels& kernels, const BlockedShape& shape, const ForwardArgs& args,
              const BlockMaxima& maxima, Scratch::Cursor scratch, BlockTask task)
      : kernels_(kernels),
        shape_(shape),
        args_(args),
        maxima_(maxima),
        scratch_(scratch),
        task_(task),
        query_(args.mask.queries().ids[static_cast<size_t>(task.index)]),
        first_token_(args.mask.queries().token_begin[static_cast<size_t>(task.index)]),
        tokens_(args.mask.queries().token_begin[static_cast<size_t>(task.index) + 1] -
                first_token_) {
    k_ = scratch_.Take(shape.packed());
    v_ = scratch_.Take(shape.packed());
    scores_ = scratch_.Take(BlockedShape::kTile);
    rescale_ = scratch_.Take(64);
    std::fill(rescale_, rescale_ + 64, 1.0f);  // to stay, of sigmoid
  }

  void Run() {
    const Scratch::Cursor heads = scratch_;
    for (int64_t g = 0; g < shape_.group; ++g) Start(g, Head(heads, g));
    const int64_t pattern = args_.mask.pattern_of(task_.kv_head);
    for (const BlockRun& run : args_.mask.row_runs().Row(pattern, task_.index)) {
      for (int32_t n = 0; n < run.count; ++n) Step(run.block(n), run.kind(), heads);
    }
    for (int64_t g = 0; g < shape_.group; ++g) Finish(g, Head(heads, g));
  }

 private:
  HeadState Head(Scratch::Cursor heads, int64_t g) const {
    heads.Take(g * HeadFloats(shape_));
    HeadState head;
    head.q_lanes = heads.Take(shape_.lanes());
    head.o = heads.Take(shape_.packed());
    head.maximum = heads.Take(64);
    head.sum = heads.Take(64);
    return head;
  }
  int64_t QueryHead(int64_t g) const { return task_.kv_head * shape_.group + g; }

  void Start(int64_t g, const HeadState& head) {
    const int64_t stride = shape_.heads * shape_.dim;
    PackBlock(kernels_, shape_, args_.q, first_token_ * stride + QueryHead(g) * shape_.dim, stride,
              tokens_, k_);
    kernels_.transpose(k_, shape_.ld, static_cast<int>(tokens_), static_cast<int>(shape_.dim),
                       head.q_lanes);
    std::fill(head.o, head.o + shape_.packed(), 0.0f);
    std::fill(head.maximum, head.maximum + 64, -kInfinity);
    std::fill(head.sum, head.sum + 64, 0.0f);
  }

  void Step(int32_t key, BlockKind kind, Scratch::Cursor heads) {
    const int64_t keys = BlockTokens(args_.mask.documents().row_length, key);
    const int64_t offset = args_.kv.Offset(task_.kv_head, key);
    PackBlock(kernels_, shape_, args_.kv.k, offset, args_.kv.token_stride(), keys, k_);
    PackBlock(kernels_, shape_, args_.kv.v, offset, args_.kv.token_stride(), keys, v_);
    uint64_t bits[64];
    if (kind == BlockKind::kPartial) {
      VisibleBitsOfKeys(args_.mask.rule(), args_.mask.documents(),
                        args_.mask.rule_head(task_.kv_head), query_, key, bits);
    }
    if (maxima_.wanted()) scores_of_blocks_.Start(key);
    for (int64_t g = 0; g < shape_.group; ++g) {
      const HeadState head = Head(heads, g);
      kernels_.gemm({.a = k_,
                     .a_row = shape_.ld,
                     .a_inner = 1,
                     .b = head.q_lanes,
                     .ldb = 64,
                     .c = scores_,
                     .ldc = 64,
                     .rows = static_cast<int>(keys),
                     .columns = 64,
                     .inner = static_cast<int>(shape_.dim),
                     .row_scale = nullptr});
      if (maxima_.wanted()) {
        scores_of_blocks_.Keep(scores_, keys, kind == BlockKind::kPartial ? bits : nullptr);
      }
      ScoresToWeights(head, keys, kind == BlockKind::kPartial ? bits : nullptr);
      kernels_.gemm({.a = scores_,
                     .a_row = 1,
                     .a_inner = 64,
                     .b = v_,
                     .ldb = shape_.ld,
                     .c = head.o,
                     .ldc = shape_.ld,
                     .rows = static_cast<int>(tokens_),
                     .columns = static_cast<int>(shape_.padded),
                     .inner = static_cast<int>(keys),
                     .row_scale = rescale_});
    }
  }

  void ScoresToWeights(const HeadState& head, int64_t keys, const uint64_t* bits) const {
    const float scale = static_cast<float>(args_.scale * kLog2E);
    if (args_.normalization == Normalization::kSigmoid) {
      kernels_.sigmoid({.s = scores_,
                        .keys = static_cast<int>(keys),
                        .scale = scale,
                        .bias = static_cast<float>(args_.bias * kLog2E),
                        .bits = bits});
      return;
    }
    kernels_.softmax({.s = scores_,
                      .keys = static_cast<int>(keys),
                      .scale = scale,
                      .bits = bits,
                      .maximum = head.maximum,
                      .sum = head.sum,
                      .rescale = rescale_});
  }

  // Writes lse and returns what o is to be multiplied by; of sigmoid, 1.
  float Normalize(const HeadState& head, int64_t i, int64_t row) const {
    if (args_.normalization == Normalization::kSigmoid) return 1.0f;
    const bool empty = head.sum[i] == 0;  // NaN scores must not look like no scores
    args_.lse.data<float>()[row] =
        empty ? -kInfinity
              : static_cast<float>(kLn2 * static_cast<double>(head.maximum[i]) +
                                   std::log(static_cast<double>(head.sum[i])));
    return empty ? 0.0f : 1.0f / head.sum[i];
  }

  void Finish(int64_t g, const HeadState& head) {
    if (maxima_.wanted()) {
      float lse[64];
      for (int64_t i = 0; i < tokens_; ++i) lse[i] = head.maximum[i] + std::log2(head.sum[i]);
      scores_of_blocks_.Raise(maxima_, task_, g, shape_.group,
                              static_cast<float>(args_.scale * kLog2E), lse, tokens_);
    }
    for (int64_t i = 0; i < tokens_; ++i) {
      const int64_t row = (first_token_ + i) * shape_.heads + QueryHead(g);
      const float scale = Normalize(head, i, row);
      const float* from = head.o + i * shape_.ld;
      if (args_.o.dtype() == DType::kBF16) {
        BF16* to = args_.o.data<BF16>() + row * shape_.dim;
        for (int64_t d = 0; d < shape_.dim; ++d) to[d] = BF16(scale * from[d]);
      } else {
        float* to = args_.o.data<float>() + row * shape_.dim;
        for (int64_t d = 0; d < shape_.dim; ++d) to[d] = scale * from[d];
      }
    }
  }

  const BlockKernels& kernels_;
  const BlockedShape& shape_;
  const ForwardArgs& args_;
  const BlockMaxima& maxima_;
  ScoreMaxima scores_of_blocks_;
  Scratch::Cursor scratch_;
  const BlockTask task_;
  const int32_t query_;
  const int64_t first_token_, tokens_;
  float *k_, *v_, *scores_, *rescale_;
};

}  // namespace

BlockedShape MakeBlockedShape(const Tensor& q, const KvView& kv) {
  const int64_t dim = kv.head_dim, padded = (dim + 15) / 16 * 16;
  return {.heads = q.dim(1),
          .kv_heads = kv.kv_heads(),
          .group = q.dim(1) / kv.kv_heads(),
          .dim = dim,
          .padded = padded,
          .ld = padded + 16};
}

void PackBlock(const BlockKernels& kernels, const BlockedShape& shape, const Tensor& from,
               int64_t offset, int64_t stride, int64_t rows, float* to) {
  const int n = static_cast<int>(rows), columns = static_cast<int>(shape.dim);
  const int padded = static_cast<int>(shape.padded);
  if (from.dtype() == DType::kBF16) {
    kernels.pack_bf16(reinterpret_cast<const uint16_t*>(from.data<BF16>() + offset), stride, n,
                      columns, padded, to, shape.ld);
  } else {
    kernels.pack_f32(from.data<float>() + offset, stride, n, columns, padded, to, shape.ld);
  }
}

void BlockedForward(Context& ctx, const BlockKernels& kernels, const ForwardArgs& args) {
  const BlockedShape shape = MakeBlockedShape(args.q, args.kv);
  const std::vector<BlockTask> tasks = TasksByCostAndHead(args.mask, args.mask.row_runs());
  const BlockMaxima maxima(args);
  const Scratch scratch(ctx, WorkerFloats(shape));
  ParallelFor(ctx, static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    ForwardTask(kernels, shape, args, maxima, scratch.Of(worker), tasks[static_cast<size_t>(i)])
        .Run();
  });
}

}  // namespace longspan::ops::cpu
