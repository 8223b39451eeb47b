#include <algorithm>

#include "ops/attention/cpu/bf16_blocks.h"
#include "ops/attention/token_sets.h"
#include "ops/core/parallel_for.h"

// Two passes without atomics, each result owned by one task: dK and dV by key blocks over columns,
// dQ by query blocks over rows. Scores are computed again in both.
namespace longspan::ops::cpu {
namespace {

struct Backward {
  const Bf16Kernels& kernels;
  const Bf16Shape shape;
  const BackwardArgs& args;
  const std::vector<int64_t> query_tokens;  // by block id
  const KeyColumns keys;

  float scale() const { return static_cast<float>(args.scale * kLog2E); }
  int dim() const { return static_cast<int>(shape.dim); }

  OperandRows QueryRows(const Tensor& from, int64_t first_token, int64_t tokens, int64_t head,
                        uint16_t* scratch) const {
    const int64_t stride = shape.heads * shape.dim;
    return RowsOf(kernels, shape, from, first_token * stride + head * shape.dim, stride, tokens,
                  scratch);
  }
  OperandRows KeyRows(const Tensor& from, int64_t kv_head, int32_t key, int64_t tokens,
                      uint16_t* scratch) const {
    return RowsOf(kernels, shape, from, args.kv.Offset(kv_head, key), args.kv.token_stride(),
                  tokens, scratch);
  }
  void ToLanes(const OperandRows& rows, uint16_t* to) const {
    kernels.to_lanes(rows.at, rows.ld, static_cast<int>(shape.padded), to);
  }
  void ToColumns(const OperandRows& rows, uint16_t* to) const {
    kernels.to_columns(rows.at, rows.ld, static_cast<int>(shape.padded), to);
  }
  // scores [tokens][lanes] = rows . lanes over head_dim.
  void Scores(const OperandRows& rows, int64_t tokens, const uint16_t* lanes, float* scores) const {
    kernels.gemm({.a = rows.at,
                  .a_row = rows.ld,
                  .b = lanes,
                  .c = scores,
                  .rows = static_cast<int>(tokens),
                  .inner = dim(),
                  .add = false});
  }
  // to [head_dim][lanes] += columns . pairs over `tokens`.
  void Accumulate(const uint16_t* columns, const uint16_t* pairs, int64_t tokens, float* to) const {
    kernels.gemm({.a = columns,
                  .a_row = kMaskBlock,
                  .b = pairs,
                  .c = to,
                  .rows = dim(),
                  .inner = static_cast<int>(tokens),
                  .add = true});
  }
  // out[lane * stride + d] += scale * from[d][lane].
  void AddRows(const float* from, int64_t tokens, float scale, float* out, int64_t stride) const {
    alignas(64) float scales[64];
    std::fill(scales, scales + 64, scale);
    kernels.add_f32({.from = from,
                     .scale = scales,
                     .tokens = static_cast<int>(tokens),
                     .dim = dim(),
                     .stride = stride},
                    out);
  }
};

// ---- dQ: lanes are queries -------------------------------------------------------------------

int64_t QueryHeadFloats(const Bf16Shape& shape) {
  return 2 * shape.operand() + shape.result() + 2 * 64;
}
int64_t QueryWorkerFloats(const Bf16Shape& shape) {
  return shape.group * QueryHeadFloats(shape) + 2 * shape.operand() + 2 * Bf16Shape::kScores +
         Bf16Shape::kPairs;
}

void QueryGradientTask(const Backward& b, Scratch::Cursor scratch, BlockTask task) {
  const Bf16Shape& shape = b.shape;
  const BlockMask& mask = b.args.mask;
  const size_t index = static_cast<size_t>(task.index);
  const std::span<const BlockRun> runs =
      mask.row_runs().Row(mask.pattern_of(task.kv_head), task.index);
  if (runs.empty()) return;
  const int64_t first = mask.queries().token_begin[index];
  const int64_t tokens = mask.queries().token_begin[index + 1] - first;
  uint16_t* k_rows = Halves(scratch.Take(shape.operand()));
  uint16_t* v_rows = Halves(scratch.Take(shape.operand()));
  float* s = scratch.Take(Bf16Shape::kScores);
  float* dp = scratch.Take(Bf16Shape::kScores);
  uint16_t* ds = Halves(scratch.Take(Bf16Shape::kPairs));

  struct Head {
    uint16_t *q, *d_out;
    float *dq, *lse, *delta;
  };
  const auto head_of = [&](int64_t g) {
    Scratch::Cursor at = scratch;
    at.Take(g * QueryHeadFloats(shape));
    Head head;
    head.q = Halves(at.Take(shape.operand()));
    head.d_out = Halves(at.Take(shape.operand()));
    head.dq = at.Take(shape.result());
    head.lse = at.Take(64);
    head.delta = at.Take(64);
    return head;
  };
  const KernelTask running(b.kernels);
  for (int64_t g = 0; g < shape.group; ++g) {
    const Head head = head_of(g);
    const int64_t h = task.kv_head * shape.group + g;
    b.ToLanes(b.QueryRows(b.args.q, first, tokens, h, k_rows), head.q);
    b.ToLanes(b.QueryRows(b.args.d_out, first, tokens, h, v_rows), head.d_out);
    LoadRowStatistics(b.args, first, tokens, h, head.lse, head.delta);
    std::fill(head.dq, head.dq + shape.result(), 0.0f);
  }
  for (const BlockRun& run : runs) {
    for (int32_t n = 0; n < run.count; ++n) {
      const int32_t key = run.block(n);
      const int64_t keys = BlockTokens(mask.documents().row_length, key);
      const OperandRows k = b.KeyRows(b.args.kv.k, task.kv_head, key, keys, k_rows);
      const OperandRows v = b.KeyRows(b.args.kv.v, task.kv_head, key, keys, v_rows);
      const uint16_t* k_columns = b.keys.Of(task.kv_head, key);
      uint64_t bits[64];
      const bool partial = run.kind() == BlockKind::kPartial;
      if (partial) {
        VisibleBitsOfKeys(mask.rule(), mask.documents(), task.kv_head, mask.queries().ids[index],
                          key, bits);
      }
      for (int64_t g = 0; g < shape.group; ++g) {
        const Head head = head_of(g);
        b.Scores(k, keys, head.q, s);
        b.Scores(v, keys, head.d_out, dp);
        b.kernels.gradient_by_query({.s = s,
                                     .dp = dp,
                                     .p = nullptr,
                                     .ds = ds,
                                     .rows = static_cast<int>(keys),
                                     .scale = b.scale(),
                                     .bits = partial ? bits : nullptr,
                                     .lse = head.lse,
                                     .delta = head.delta});
        b.Accumulate(k_columns, ds, keys, head.dq);
      }
    }
  }
  const int64_t stride = shape.heads * shape.dim;
  for (int64_t g = 0; g < shape.group; ++g) {
    const int64_t h = task.kv_head * shape.group + g;
    b.AddRows(head_of(g).dq, tokens, static_cast<float>(b.args.scale),
              b.args.dq.data<float>() + first * stride + h * shape.dim, stride);
  }
}

// ---- dK, dV: lanes are keys ------------------------------------------------------------------

int64_t KeyWorkerFloats(const Bf16Shape& shape) {
  return 6 * shape.operand() + 2 * shape.result() + 2 * Bf16Shape::kScores + 2 * Bf16Shape::kPairs +
         2 * 64;
}

void KeyGradientTask(const Backward& b, Scratch::Cursor scratch, BlockTask task) {
  const Bf16Shape& shape = b.shape;
  const BlockMask& mask = b.args.mask;
  const int64_t row_length = mask.documents().row_length;
  const int32_t key = mask.keys().ids[static_cast<size_t>(task.index)];
  const int64_t keys = BlockTokens(row_length, key);
  const std::span<const BlockRun> runs =
      mask.column_runs().Row(mask.pattern_of(task.kv_head), task.index);
  if (runs.empty()) return;
  uint16_t* k_lanes = Halves(scratch.Take(shape.operand()));
  uint16_t* v_lanes = Halves(scratch.Take(shape.operand()));
  uint16_t* q_rows = Halves(scratch.Take(shape.operand()));
  uint16_t* d_out_rows = Halves(scratch.Take(shape.operand()));
  uint16_t* q_columns = Halves(scratch.Take(shape.operand()));
  uint16_t* d_out_columns = Halves(scratch.Take(shape.operand()));
  float* dk = scratch.Take(shape.result());
  float* dv = scratch.Take(shape.result());
  float* s = scratch.Take(Bf16Shape::kScores);
  float* dp = scratch.Take(Bf16Shape::kScores);
  uint16_t* p = Halves(scratch.Take(Bf16Shape::kPairs));
  uint16_t* ds = Halves(scratch.Take(Bf16Shape::kPairs));
  float* lse = scratch.Take(64);
  float* delta = scratch.Take(64);
  const KernelTask running(b.kernels);
  std::fill(dk, dk + shape.result(), 0.0f);
  std::fill(dv, dv + shape.result(), 0.0f);
  b.ToLanes(b.KeyRows(b.args.kv.k, task.kv_head, key, keys, q_rows), k_lanes);
  b.ToLanes(b.KeyRows(b.args.kv.v, task.kv_head, key, keys, q_rows), v_lanes);

  for (const BlockRun& run : runs) {
    for (int32_t n = 0; n < run.count; ++n) {
      const int32_t query = run.block(n);
      const int64_t first = b.query_tokens[static_cast<size_t>(query)];
      const int64_t tokens = BlockTokens(row_length, query);
      uint64_t bits[64];
      const bool partial = run.kind() == BlockKind::kPartial;
      if (partial) {
        VisibleBitsOfQueries(mask.rule(), mask.documents(), task.kv_head, query, key, bits);
      }
      for (int64_t g = 0; g < shape.group; ++g) {
        const int64_t h = task.kv_head * shape.group + g;
        const OperandRows q = b.QueryRows(b.args.q, first, tokens, h, q_rows);
        const OperandRows d_out = b.QueryRows(b.args.d_out, first, tokens, h, d_out_rows);
        b.ToColumns(q, q_columns);
        b.ToColumns(d_out, d_out_columns);
        LoadRowStatistics(b.args, first, tokens, h, lse, delta);
        b.Scores(q, tokens, k_lanes, s);
        b.Scores(d_out, tokens, v_lanes, dp);
        b.kernels.gradient_by_key({.s = s,
                                   .dp = dp,
                                   .p = p,
                                   .ds = ds,
                                   .rows = static_cast<int>(tokens),
                                   .scale = b.scale(),
                                   .bits = partial ? bits : nullptr,
                                   .lse = lse,
                                   .delta = delta});
        b.Accumulate(d_out_columns, p, tokens, dv);
        b.Accumulate(q_columns, ds, tokens, dk);
      }
    }
  }
  const int64_t offset = b.args.dkv.Offset(task.kv_head, key);
  b.AddRows(dk, keys, static_cast<float>(b.args.scale), b.args.dkv.dk.data<float>() + offset,
            b.args.dkv.token_stride());
  b.AddRows(dv, keys, 1.0f, b.args.dkv.dv.data<float>() + offset, b.args.dkv.token_stride());
}

}  // namespace

void Bf16Backward(Context& ctx, const Bf16Kernels& kernels, const BackwardArgs& args) {
  const Bf16Shape shape = MakeBf16Shape(args.q, args.kv);
  const Backward b{kernels, shape, args, QueryTokenOffsets(args.mask),
                   KeyColumns(ctx, kernels, shape, args.kv, args.kv.k, args.mask)};
  const std::vector<BlockTask> columns = TasksByCost(args.mask, args.mask.column_runs());
  const std::vector<BlockTask> rows = TasksByCost(args.mask, args.mask.row_runs());
  const Scratch scratch(ctx, std::max(QueryWorkerFloats(shape), KeyWorkerFloats(shape)));
  ParallelFor(ctx, static_cast<int64_t>(columns.size()), [&](int64_t i, int worker) {
    KeyGradientTask(b, scratch.Of(worker), columns[static_cast<size_t>(i)]);
  });
  ParallelFor(ctx, static_cast<int64_t>(rows.size()), [&](int64_t i, int worker) {
    QueryGradientTask(b, scratch.Of(worker), rows[static_cast<size_t>(i)]);
  });
}

}  // namespace longspan::ops::cpu
