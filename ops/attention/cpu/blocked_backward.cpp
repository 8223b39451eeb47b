#include <algorithm>
#include <limits>

#include "ops/attention/cpu/blocked.h"
#include "ops/attention/token_sets.h"
#include "ops/core/parallel_for.h"

// Two passes without atomics, each result owned by one task: dQ by query blocks over rows, dK and
// dV by key blocks over columns. Scores are computed again in both.
namespace longspan::ops::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Backward {
  const BlockKernels& kernels;
  const BlockedShape shape;
  const BackwardArgs& args;
  const std::vector<int64_t> query_tokens;  // by block id

  float scale() const { return static_cast<float>(args.scale * kLog2E); }
  bool sigmoid() const { return args.normalization == Normalization::kSigmoid; }

  void PackRows(const Tensor& from, int64_t first_token, int64_t tokens, int64_t head,
                float* to) const {
    const int64_t stride = shape.heads * shape.dim;
    PackBlock(kernels, shape, from, first_token * stride + head * shape.dim, stride, tokens, to);
  }
  void PackKeys(const Tensor& from, int64_t kv_head, int32_t key, int64_t keys, float* to) const {
    PackBlock(kernels, shape, from, args.kv.Offset(kv_head, key), args.kv.token_stride(), keys, to);
  }
  void Transpose(const float* from, int64_t rows, float* to) const {
    kernels.transpose(from, shape.ld, static_cast<int>(rows), static_cast<int>(shape.dim), to);
  }
  void Scores(const float* a, int64_t rows, const float* lanes, float* tile) const {
    ScoreTile(kernels, shape, a, rows, lanes, tile);
  }
  void Accumulate(const float* tile, int64_t lanes, const float* b, int64_t inner,
                  const float* ones, float* to) const {
    AccumulateTile(kernels, shape, tile, lanes, b, inner, ones, to);
  }
  void GradientByQuery(const GradientStep& step) const {
    sigmoid() ? kernels.sigmoid_gradient_by_query(step) : kernels.gradient_by_query(step);
  }
  void GradientByKey(const GradientStep& step) const {
    sigmoid() ? kernels.sigmoid_gradient_by_key(step) : kernels.gradient_by_key(step);
  }
  // out[row * stride + d] += scale * from[row][d].
  void AddRows(const float* from, int64_t rows, float scale, float* out, int64_t stride) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < shape.dim; ++d) out[i * stride + d] += scale * from[i * shape.ld + d];
    }
  }
};

// ---- dQ: lanes are queries -------------------------------------------------------------------

int64_t QueryHeadFloats(const BlockedShape& shape) {
  return 2 * shape.lanes() + shape.packed() + 2 * 64;
}
int64_t QueryWorkerFloats(const BlockedShape& shape) {
  return shape.group * QueryHeadFloats(shape) + 2 * shape.packed() + 2 * BlockedShape::kTile + 64;
}

void QueryGradientTask(const Backward& b, Scratch::Cursor scratch, BlockTask task) {
  const BlockedShape& shape = b.shape;
  const BlockMask& mask = b.args.mask;
  const size_t index = static_cast<size_t>(task.index);
  const std::span<const BlockRun> runs =
      mask.row_runs().Row(mask.pattern_of(task.kv_head), task.index);
  if (runs.empty()) return;
  const int64_t first = mask.queries().token_begin[index];
  const int64_t tokens = mask.queries().token_begin[index + 1] - first;
  float* k = scratch.Take(shape.packed());
  float* v = scratch.Take(shape.packed());
  float* s = scratch.Take(BlockedShape::kTile);
  float* dp = scratch.Take(BlockedShape::kTile);
  float* ones = scratch.Take(64);
  std::fill(ones, ones + 64, 1.0f);

  struct Head {
    float *q_lanes, *d_out_lanes, *dq, *lse, *delta;
  };
  const auto head_of = [&](int64_t g) {
    Scratch::Cursor at = scratch;
    at.Take(g * QueryHeadFloats(shape));
    Head head;
    head.q_lanes = at.Take(shape.lanes());
    head.d_out_lanes = at.Take(shape.lanes());
    head.dq = at.Take(shape.packed());
    head.lse = at.Take(64);
    head.delta = at.Take(64);
    return head;
  };
  for (int64_t g = 0; g < shape.group; ++g) {
    const Head head = head_of(g);
    const int64_t h = task.kv_head * shape.group + g;
    b.PackRows(b.args.q, first, tokens, h, k);
    b.Transpose(k, tokens, head.q_lanes);
    b.PackRows(b.args.d_out, first, tokens, h, k);
    b.Transpose(k, tokens, head.d_out_lanes);
    LoadRowStatistics(b.args, first, tokens, h, head.lse, head.delta);
    std::fill(head.dq, head.dq + shape.packed(), 0.0f);
  }
  for (const BlockRun& run : runs) {
    for (int32_t n = 0; n < run.count; ++n) {
      const int32_t key = run.block(n);
      const int64_t keys = BlockTokens(mask.documents().row_length, key);
      b.PackKeys(b.args.kv.k, task.kv_head, key, keys, k);
      b.PackKeys(b.args.kv.v, task.kv_head, key, keys, v);
      uint64_t bits[64];
      const bool partial = run.kind() == BlockKind::kPartial;
      if (partial) {
        VisibleBitsOfKeys(mask.rule(), mask.documents(), mask.rule_head(task.kv_head),
                          mask.queries().ids[index], key, bits);
      }
      for (int64_t g = 0; g < shape.group; ++g) {
        const Head head = head_of(g);
        b.Scores(k, keys, head.q_lanes, s);
        b.Scores(v, keys, head.d_out_lanes, dp);
        b.GradientByQuery({.s = s,
                           .dp = dp,
                           .rows = static_cast<int>(keys),
                           .scale = b.scale(),
                           .bits = partial ? bits : nullptr,
                           .lse = head.lse,
                           .delta = head.delta});
        b.Accumulate(dp, tokens, k, keys, ones, head.dq);
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

int64_t KeyWorkerFloats(const BlockedShape& shape) {
  return 2 * shape.lanes() + 4 * shape.packed() + 2 * BlockedShape::kTile + 3 * 64;
}

void KeyGradientTask(const Backward& b, Scratch::Cursor scratch, BlockTask task) {
  const BlockedShape& shape = b.shape;
  const BlockMask& mask = b.args.mask;
  const int64_t row_length = mask.documents().row_length;
  const int32_t key = mask.keys().ids[static_cast<size_t>(task.index)];
  const int64_t keys = BlockTokens(row_length, key);
  const std::span<const BlockRun> runs =
      mask.column_runs().Row(mask.pattern_of(task.kv_head), task.index);
  if (runs.empty()) return;
  float* k_lanes = scratch.Take(shape.lanes());
  float* v_lanes = scratch.Take(shape.lanes());
  float* dk = scratch.Take(shape.packed());
  float* dv = scratch.Take(shape.packed());
  float* q = scratch.Take(shape.packed());
  float* d_out = scratch.Take(shape.packed());
  float* s = scratch.Take(BlockedShape::kTile);
  float* dp = scratch.Take(BlockedShape::kTile);
  float* lse = scratch.Take(64);
  float* delta = scratch.Take(64);
  float* ones = scratch.Take(64);
  std::fill(ones, ones + 64, 1.0f);
  std::fill(dk, dk + shape.packed(), 0.0f);
  std::fill(dv, dv + shape.packed(), 0.0f);
  b.PackKeys(b.args.kv.k, task.kv_head, key, keys, q);
  b.Transpose(q, keys, k_lanes);
  b.PackKeys(b.args.kv.v, task.kv_head, key, keys, q);
  b.Transpose(q, keys, v_lanes);

  for (const BlockRun& run : runs) {
    for (int32_t n = 0; n < run.count; ++n) {
      const int32_t query = run.block(n);
      const int64_t first = b.query_tokens[static_cast<size_t>(query)];
      const int64_t tokens = BlockTokens(row_length, query);
      uint64_t bits[64];
      const bool partial = run.kind() == BlockKind::kPartial;
      if (partial) {
        VisibleBitsOfQueries(mask.rule(), mask.documents(), mask.rule_head(task.kv_head), query,
                             key, bits);
      }
      for (int64_t g = 0; g < shape.group; ++g) {
        const int64_t h = task.kv_head * shape.group + g;
        b.PackRows(b.args.q, first, tokens, h, q);
        b.PackRows(b.args.d_out, first, tokens, h, d_out);
        LoadRowStatistics(b.args, first, tokens, h, lse, delta);
        b.Scores(q, tokens, k_lanes, s);
        b.Scores(d_out, tokens, v_lanes, dp);
        b.GradientByKey({.s = s,
                         .dp = dp,
                         .rows = static_cast<int>(tokens),
                         .scale = b.scale(),
                         .bits = partial ? bits : nullptr,
                         .lse = lse,
                         .delta = delta});
        b.Accumulate(s, keys, d_out, tokens, ones, dv);
        b.Accumulate(dp, keys, q, tokens, ones, dk);
      }
    }
  }
  const int64_t offset = b.args.dkv.Offset(task.kv_head, key);
  b.AddRows(dk, keys, static_cast<float>(b.args.scale), b.args.dkv.dk.data<float>() + offset,
            b.args.dkv.token_stride());
  b.AddRows(dv, keys, 1.0f, b.args.dkv.dv.data<float>() + offset, b.args.dkv.token_stride());
}

}  // namespace

void LoadRowStatistics(const BackwardArgs& args, int64_t first_token, int64_t tokens, int64_t head,
                       float* lse, float* delta) {
  std::fill(lse + tokens, lse + 64, kInfinity);
  if (args.normalization == Normalization::kSigmoid) {
    std::fill(lse, lse + tokens, static_cast<float>(-args.bias * kLog2E));
    std::fill(delta, delta + 64, 0.0f);
    return;
  }
  const float* lse_in = args.lse.data<float>();
  const float* delta_in = args.delta.data<float>();
  const float* dlse = args.dlse.defined() ? args.dlse.data<float>() : nullptr;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t row = (first_token + i) * args.lse.dim(1) + head;
    lse[i] = static_cast<float>(kLog2E * static_cast<double>(lse_in[row]));
    delta[i] = delta_in[row] - (dlse != nullptr ? dlse[row] : 0.0f);
  }
  std::fill(delta + tokens, delta + 64, 0.0f);
}

void BlockedBackward(Context& ctx, const BlockKernels& kernels, const BackwardArgs& args) {
  const Backward b{kernels, MakeBlockedShape(args.q, args.kv), args, QueryTokenOffsets(args.mask)};
  const std::vector<BlockTask> columns = TasksByCostAndHead(args.mask, args.mask.column_runs());
  const std::vector<BlockTask> rows = TasksByCostAndHead(args.mask, args.mask.row_runs());
  const Scratch scratch(ctx, std::max(QueryWorkerFloats(b.shape), KeyWorkerFloats(b.shape)));
  ParallelFor(ctx, static_cast<int64_t>(columns.size()), [&](int64_t i, int worker) {
    KeyGradientTask(b, scratch.Of(worker), columns[static_cast<size_t>(i)]);
  });
  ParallelFor(ctx, static_cast<int64_t>(rows.size()), [&](int64_t i, int worker) {
    QueryGradientTask(b, scratch.Of(worker), rows[static_cast<size_t>(i)]);
  });
}

}  // namespace longspan::ops::cpu
