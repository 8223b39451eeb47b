#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "ops/attention/cpu/bf16_blocks.h"
#include "ops/attention/token_sets.h"
#include "ops/core/parallel_for.h"

namespace longspan::ops::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One call: what all its tasks share.
struct Forward {
  const Bf16Kernels& kernels;
  const Bf16Shape shape;
  const ForwardArgs& args;
  const KeyColumns values;
};

// Key blocks whose share of o is summed up before o, which does not fit the first cache, is read
// and written.
constexpr int kBlocksAtOnce = 4;

// Running state of one query head of a task; its queries are the lanes.
struct HeadState {
  uint16_t* q;     // lanes form
  float* o;        // [padded][64], of softmax not yet divided by weight
  float* maximum;  // [64], in units of log2; of softmax, as what follows
  float* sum;      // [64]
  float* weight;   // [64]
  uint16_t* p;     // [kBlocksAtOnce] in lanes form
};
// Shares that o still lacks.
struct Waiting {
  std::array<Bf16Product, kBlocksAtOnce> products;
  size_t count = 0;
  int next_place = 0;  // in HeadState::p
};
int64_t HeadFloats(const Bf16Shape& shape) {
  return shape.operand() + shape.result() + 3 * 64 + kBlocksAtOnce * Bf16Shape::kPairs;
}
int64_t WorkerFloats(const Bf16Shape& shape) {
  return shape.group * HeadFloats(shape) + shape.operand() + Bf16Shape::kScores + 64;
}

class ForwardTask {
 public:
  ForwardTask(const Forward& call, Scratch::Cursor scratch, BlockTask task)
      : call_(call),
        kernels_(call.kernels),
        shape_(call.shape),
        mask_(call.args.mask),
        task_(task),
        query_(mask_.queries().ids[static_cast<size_t>(task.index)]),
        first_token_(mask_.queries().token_begin[static_cast<size_t>(task.index)]),
        tokens_(mask_.queries().token_begin[static_cast<size_t>(task.index) + 1] - first_token_),
        rows_(Halves(scratch.Take(shape_.operand()))),
        scores_(scratch.Take(Bf16Shape::kScores)),
        rescale_(scratch.Take(64)),
        heads_(scratch),
        waiting_(static_cast<size_t>(shape_.group)) {}

  void Run() {
    const KernelTask running(kernels_);
    for (int64_t g = 0; g < shape_.group; ++g) Start(g);
    const std::span<const BlockRun> runs =
        mask_.row_runs().Row(mask_.pattern_of(task_.kv_head), task_.index);
    for (size_t r = 0; r < runs.size(); ++r) {
      for (int32_t n = 0; n < runs[r].count; ++n) {
        const int32_t next = n + 1 < runs[r].count ? runs[r].block(n + 1)
                             : r + 1 < runs.size() ? runs[r + 1].first
                                                   : -1;
        Step(runs[r].block(n), runs[r].kind(), next);
      }
    }
    for (int64_t g = 0; g < shape_.group; ++g) {
      AddWaiting(g);
      Finish(g);
    }
  }

 private:
  HeadState Head(int64_t g) const {
    Scratch::Cursor at = heads_;
    at.Take(g * HeadFloats(shape_));
    HeadState head;
    head.q = Halves(at.Take(shape_.operand()));
    head.o = at.Take(shape_.result());
    head.maximum = at.Take(64);
    head.sum = at.Take(64);
    head.weight = at.Take(64);
    head.p = Halves(at.Take(kBlocksAtOnce * Bf16Shape::kPairs));
    return head;
  }
  int64_t QueryHead(int64_t g) const { return task_.kv_head * shape_.group + g; }

  void Start(int64_t g) const {
    const HeadState head = Head(g);
    const int64_t stride = shape_.heads * shape_.dim;
    const OperandRows q =
        RowsOf(kernels_, shape_, call_.args.q, first_token_ * stride + QueryHead(g) * shape_.dim,
               stride, tokens_, rows_);
    kernels_.to_lanes(q.at, q.ld, static_cast<int>(shape_.padded), head.q);
    std::fill(head.o, head.o + shape_.result(), 0.0f);
    std::fill(head.maximum, head.maximum + 64, -kInfinity);
    std::fill(head.sum, head.sum + 64, 0.0f);
    std::fill(head.weight, head.weight + 64, 0.0f);
  }

  // Block `next` (-1: none) is asked for meanwhile.
  void Step(int32_t key, BlockKind kind, int32_t next) {
    const int64_t keys = BlockTokens(mask_.documents().row_length, key);
    const OperandRows k =
        RowsOf(kernels_, shape_, call_.args.kv.k, call_.args.kv.Offset(task_.kv_head, key),
               call_.args.kv.token_stride(), keys, rows_);
    const uint16_t* v = call_.values.Of(task_.kv_head, key);
    const bool partial = kind == BlockKind::kPartial;
    uint64_t bits[64];
    if (partial) {
      VisibleBitsOfKeys(mask_.rule(), mask_.documents(), mask_.rule_head(task_.kv_head), query_,
                        key, bits);
    }
    const int dim = static_cast<int>(shape_.dim);
    Bf16Ahead next_k, next_v;
    if (next >= 0) {
      next_k = AheadOf(call_.args.kv.k, call_.args.kv.Offset(task_.kv_head, next),
                       call_.args.kv.token_stride(), shape_.dim,
                       BlockTokens(mask_.documents().row_length, next));
      next_v = {call_.values.Of(task_.kv_head, next), kMaskBlock * 2, kMaskBlock * 2, dim};
    }
    for (int64_t g = 0; g < shape_.group; ++g) {
      const HeadState head = Head(g);
      Multiply(kernels_, k, head.q, dim, scores_, keys, false, g == 0 ? next_k : Bf16Ahead{},
               g == 0 ? next_v : Bf16Ahead{});
      Waiting& waiting = waiting_[static_cast<size_t>(g)];
      uint16_t* p = head.p + waiting.next_place * 2 * Bf16Shape::kPairs;
      waiting.next_place = (waiting.next_place + 1) % kBlocksAtOnce;
      if (ScoresToWeights(head, keys, partial ? bits : nullptr, p)) {
        AddWaiting(g);  // which is relative to the maximum of before
        kernels_.scale_lanes(head.o, dim, rescale_);
      }
      waiting.products[waiting.count++] = {v, p, static_cast<int>(keys)};
      if (waiting.count == kBlocksAtOnce) AddWaiting(g);
    }
  }

  // Whether earlier output must be multiplied by rescale_.
  bool ScoresToWeights(const HeadState& head, int64_t keys, const uint64_t* bits,
                       uint16_t* p) const {
    const float scale = static_cast<float>(call_.args.scale * kLog2E);
    if (call_.args.normalization == Normalization::kSigmoid) {
      kernels_.sigmoid({.s = scores_,
                        .p = p,
                        .keys = static_cast<int>(keys),
                        .scale = scale,
                        .bias = static_cast<float>(call_.args.bias * kLog2E),
                        .bits = bits});
      return false;
    }
    return kernels_.softmax({.s = scores_,
                             .p = p,
                             .keys = static_cast<int>(keys),
                             .scale = scale,
                             .bits = bits,
                             .maximum = head.maximum,
                             .sum = head.sum,
                             .weight = head.weight,
                             .rescale = rescale_});
  }

  void AddWaiting(int64_t g) {
    Waiting& waiting = waiting_[static_cast<size_t>(g)];
    if (waiting.count == 0) return;
    kernels_.gemm({.products = waiting.products.data(),
                   .count = static_cast<int>(waiting.count),
                   .a_row = kMaskBlock,
                   .c = Head(g).o,
                   .rows = static_cast<int>(shape_.dim),
                   .add = true});
    waiting.count = 0;
  }

  // Writes lse and returns what o is to be multiplied by; of sigmoid, 1.
  float Normalize(const HeadState& head, int64_t g, int64_t i) const {
    if (call_.args.normalization == Normalization::kSigmoid) return 1.0f;
    const int64_t row = (first_token_ + i) * shape_.heads + QueryHead(g);
    const bool empty = head.sum[i] == 0;  // NaN scores must not look like no scores
    call_.args.lse.data<float>()[row] =
        empty ? -kInfinity
              : static_cast<float>(kLn2 * static_cast<double>(head.maximum[i]) +
                                   std::log(static_cast<double>(head.sum[i])));
    return empty ? 0.0f : 1.0f / head.weight[i];
  }

  void Finish(int64_t g) const {
    const HeadState head = Head(g);
    for (int64_t i = 0; i < tokens_; ++i) rescale_[i] = Normalize(head, g, i);
    std::fill(rescale_ + tokens_, rescale_ + 64, 0.0f);
    const LaneStore store{.from = head.o,
                          .scale = rescale_,
                          .tokens = static_cast<int>(tokens_),
                          .dim = static_cast<int>(shape_.dim),
                          .stride = shape_.heads * shape_.dim};
    const int64_t to = first_token_ * store.stride + QueryHead(g) * shape_.dim;
    const Tensor& o = call_.args.o;
    if (o.dtype() == DType::kBF16) {
      kernels_.store_bf16(store, reinterpret_cast<uint16_t*>(o.data<BF16>()) + to);
    } else {
      kernels_.store_f32(store, o.data<float>() + to);
    }
  }

  const Forward& call_;
  const Bf16Kernels& kernels_;
  const Bf16Shape& shape_;
  const BlockMask& mask_;
  const BlockTask task_;
  const int32_t query_;
  const int64_t first_token_, tokens_;
  uint16_t* const rows_;
  float* const scores_;
  float* const rescale_;
  const Scratch::Cursor heads_;
  std::vector<Waiting> waiting_;  // of each query head
};

}  // namespace

void Bf16Forward(Context& ctx, const Bf16Kernels& kernels, const ForwardArgs& args) {
  const Bf16Shape shape = MakeBf16Shape(args.q.dim(1), args.kv.kv_heads(), args.kv.head_dim);
  const Forward call{kernels, shape, args,
                     KeyColumns(ctx, kernels, shape, args.kv, args.kv.v, args.mask)};
  const std::vector<BlockTask> tasks = TasksByCostAndHead(args.mask, args.mask.row_runs());
  const Scratch scratch(ctx, WorkerFloats(shape));
  ParallelFor(ctx, static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    ForwardTask(call, scratch.Of(worker), tasks[static_cast<size_t>(i)]).Run();
  });
}

}  // namespace longspan::ops::cpu
