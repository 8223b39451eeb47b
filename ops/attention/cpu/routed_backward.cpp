#include "ops/attention/cpu/routed_blocked.h"
#include "ops/core/parallel_for.h"

// As for block masks, two passes that each own their results: dQ by segments of query rows, dK and
// dV by pieces of key blocks. Scores are computed again in both.
namespace longspan::ops::cpu {
namespace {

struct Backward {
  const BlockKernels& kernels;
  const BlockedShape shape;
  const RoutedBackwardArgs& args;
  GatherClock& clock;

  float scale() const { return static_cast<float>(args.scale * kLog2E); }

  void Scores(const float* a, int64_t rows, const float* lanes, float* tile) const {
    ScoreTile(kernels, shape, a, rows, lanes, tile);
  }
  void Accumulate(const float* tile, int64_t lanes, const float* b, int64_t inner,
                  const float* ones, float* to) const {
    AccumulateTile(kernels, shape, tile, lanes, b, inner, ones, to);
  }
  void AddRow(const float* from, float factor, float* to) const {
    for (int64_t d = 0; d < shape.dim; ++d) to[d] += factor * from[d];
  }
};

// ---- dQ: lanes are queries -------------------------------------------------------------------

int64_t QueryWorkerFloats(const BlockedShape& shape) {
  return (2 * kChunkKeys / 64 + 2) * shape.packed() + 2 * shape.lanes() + 2 * BlockedShape::kTile +
         3 * 64;
}

class QueryGradientTask {
 public:
  QueryGradientTask(const Backward& b, Tensor& dq, Scratch::Cursor scratch) : b_(b), to_(dq) {
    const BlockedShape& shape = b.shape;
    k_ = scratch.Take(kChunkKeys / 64 * shape.packed());
    v_ = scratch.Take(kChunkKeys / 64 * shape.packed());
    rows_ = scratch.Take(shape.packed());
    dq_ = scratch.Take(shape.packed());
    q_lanes_ = scratch.Take(shape.lanes());
    d_out_lanes_ = scratch.Take(shape.lanes());
    s_ = scratch.Take(BlockedShape::kTile);
    dp_ = scratch.Take(BlockedShape::kTile);
    lse_ = scratch.Take(64);
    delta_ = scratch.Take(64);
    ones_ = scratch.Take(64);
    std::fill(ones_, ones_ + 64, 1.0f);
  }

  void Run(const Segment& segment) {
    const RoutedBackwardArgs& args = b_.args;
    std::vector<FlatRow> listed;
    for (int64_t block = segment.first_block; block < segment.last_block; ++block) {
      b_.clock.Time([&] { RowsOfSegment(args.lists, segment, block, b_.shape.group, listed); });
      if (listed.empty()) continue;
      ForEachChunk(args.kv, args.blocks, segment.kv_head, block, [&](const KeyChunk& chunk) {
        const int64_t stride = args.kv.token_stride();
        for (int64_t p = 0; p < chunk.pieces(); ++p) {
          const int64_t at = chunk.offset + p * 64 * stride, keys = chunk.KeysOf(p);
          PackBlock(b_.kernels, b_.shape, args.kv.k, at, stride, keys, Piece(k_, p));
          PackBlock(b_.kernels, b_.shape, args.kv.v, at, stride, keys, Piece(v_, p));
        }
        for (size_t at = 0; at < listed.size(); at += 64) {
          Tile(chunk, std::span(listed).subspan(at, std::min<size_t>(64, listed.size() - at)));
        }
      });
    }
  }

 private:
  float* Piece(float* packed, int64_t p) const { return packed + p * b_.shape.packed(); }

  void Tile(const KeyChunk& chunk, std::span<const FlatRow> rows) {
    const auto n = static_cast<int64_t>(rows.size());
    b_.clock.Time([&] {
      GatherRows(b_.kernels, b_.shape, b_.args.q, rows, rows_);
      TransposeTo(b_.kernels, b_.shape, rows_, n, q_lanes_);
      GatherRows(b_.kernels, b_.shape, b_.args.d_out, rows, rows_);
      TransposeTo(b_.kernels, b_.shape, rows_, n, d_out_lanes_);
      LoadRowStatistics(b_.args, rows, lse_, delta_);
    });
    std::fill(dq_, dq_ + b_.shape.packed(), 0.0f);
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      const int64_t keys = chunk.KeysOf(p);
      b_.Scores(Piece(k_, p), keys, q_lanes_, s_);
      b_.Scores(Piece(v_, p), keys, d_out_lanes_, dp_);
      b_.kernels.gradient_by_query({.s = s_,
                                    .dp = dp_,
                                    .rows = static_cast<int>(keys),
                                    .scale = b_.scale(),
                                    .bits = nullptr,
                                    .lse = lse_,
                                    .delta = delta_});
      b_.Accumulate(dp_, n, Piece(k_, p), keys, ones_, dq_);
    }
    b_.clock.Time([&] {
      for (int64_t i = 0; i < n; ++i) {
        b_.AddRow(dq_ + i * b_.shape.ld, static_cast<float>(b_.args.scale),
                  to_.data<float>() + rows[static_cast<size_t>(i)] * b_.shape.dim);
      }
    });
  }

  const Backward& b_;
  Tensor& to_;
  float *k_, *v_, *rows_, *dq_, *q_lanes_, *d_out_lanes_, *s_, *dp_, *lse_, *delta_, *ones_;
};

// ---- dK, dV: lanes are keys ------------------------------------------------------------------

int64_t KeyWorkerFloats(const BlockedShape& shape) {
  const int64_t pieces = kGradientKeys / 64;
  return pieces * (2 * shape.lanes() + 2 * shape.packed()) + 2 * shape.packed() +
         2 * BlockedShape::kTile + 3 * 64;
}

class KeyGradientTask {
 public:
  KeyGradientTask(const Backward& b, const KvGradView& dkv, Scratch::Cursor scratch)
      : b_(b), to_(dkv) {
    const BlockedShape& shape = b.shape;
    const int64_t pieces = kGradientKeys / 64;
    k_lanes_ = scratch.Take(pieces * shape.lanes());
    v_lanes_ = scratch.Take(pieces * shape.lanes());
    dk_ = scratch.Take(pieces * shape.packed());
    dv_ = scratch.Take(pieces * shape.packed());
    q_ = scratch.Take(shape.packed());
    d_out_ = scratch.Take(shape.packed());
    s_ = scratch.Take(BlockedShape::kTile);
    dp_ = scratch.Take(BlockedShape::kTile);
    lse_ = scratch.Take(64);
    delta_ = scratch.Take(64);
    ones_ = scratch.Take(64);
    std::fill(ones_, ones_ + 64, 1.0f);
  }

  void Run(const KeyTask& task) {
    const BlockedShape& shape = b_.shape;
    const KvView& kv = b_.args.kv;
    const KeyChunk chunk = task.In(kv);
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      const int64_t stride = kv.token_stride(), keys = chunk.KeysOf(p);
      const int64_t at = chunk.offset + p * 64 * stride;
      PackBlock(b_.kernels, shape, kv.k, at, stride, keys, q_);
      TransposeTo(b_.kernels, shape, q_, keys, k_lanes_ + p * shape.lanes());
      PackBlock(b_.kernels, shape, kv.v, at, stride, keys, q_);
      TransposeTo(b_.kernels, shape, q_, keys, v_lanes_ + p * shape.lanes());
    }
    std::fill(dk_, dk_ + chunk.pieces() * shape.packed(), 0.0f);
    std::fill(dv_, dv_ + chunk.pieces() * shape.packed(), 0.0f);
    ForEachTileOf(task, b_.args.lists, shape.group,
                  [&](std::span<const FlatRow> rows) { Tile(chunk, rows); });
    Add(task.In(to_), dk_, static_cast<float>(b_.args.scale), to_.dk);
    Add(task.In(to_), dv_, 1.0f, to_.dv);
  }

 private:
  void Tile(const KeyChunk& chunk, std::span<const FlatRow> rows) {
    const BlockedShape& shape = b_.shape;
    const auto n = static_cast<int64_t>(rows.size());
    b_.clock.Time([&] {
      GatherRows(b_.kernels, shape, b_.args.q, rows, q_);
      GatherRows(b_.kernels, shape, b_.args.d_out, rows, d_out_);
      LoadRowStatistics(b_.args, rows, lse_, delta_);
    });
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      const int64_t keys = chunk.KeysOf(p);
      b_.Scores(q_, n, k_lanes_ + p * shape.lanes(), s_);
      b_.Scores(d_out_, n, v_lanes_ + p * shape.lanes(), dp_);
      b_.kernels.gradient_by_key({.s = s_,
                                  .dp = dp_,
                                  .rows = static_cast<int>(n),
                                  .scale = b_.scale(),
                                  .bits = nullptr,
                                  .lse = lse_,
                                  .delta = delta_});
      b_.Accumulate(s_, keys, d_out_, n, ones_, dv_ + p * shape.packed());
      b_.Accumulate(dp_, keys, q_, n, ones_, dk_ + p * shape.packed());
    }
  }

  void Add(const KeyChunk& chunk, const float* from, float factor, const Tensor& to) const {
    for (int64_t t = 0; t < chunk.count; ++t) {
      b_.AddRow(from + t * b_.shape.ld, factor,
                to.data<float>() + chunk.offset + t * to_.token_stride());
    }
  }

  const Backward& b_;
  const KvGradView& to_;
  float *k_lanes_, *v_lanes_, *dk_, *dv_;  // of all pieces
  float *q_, *d_out_, *s_, *dp_, *lse_, *delta_, *ones_;
};

}  // namespace

void BlockedRoutedQueryGradient(Context& ctx, const BlockKernels& kernels,
                                const RoutedBackwardArgs& args, Tensor& dq) {
  GatherClock clock(ctx);
  const Backward b{kernels, RoutedShape(args.q, args.kv.kv_heads()), args, clock};
  const std::vector<Segment> segments = SegmentsOf(args.queries, args.lists, b.shape.kv_heads);
  const Scratch scratch(ctx, QueryWorkerFloats(b.shape));
  ParallelFor(ctx, static_cast<int64_t>(segments.size()), [&](int64_t i, int worker) {
    QueryGradientTask(b, dq, scratch.Of(worker)).Run(segments[static_cast<size_t>(i)]);
  });
}

void BlockedRoutedKeyGradient(Context& ctx, const BlockKernels& kernels,
                              const RoutedBackwardArgs& args, const KvGradView& dkv) {
  GatherClock clock(ctx);
  const Backward b{kernels, RoutedShape(args.q, args.kv.kv_heads()), args, clock};
  const std::vector<KeyTask> keys = KeyTasks(args.blocks, args.lists, b.shape.kv_heads);
  const Scratch scratch(ctx, KeyWorkerFloats(b.shape));
  ParallelFor(ctx, static_cast<int64_t>(keys.size()), [&](int64_t i, int worker) {
    KeyGradientTask(b, dkv, scratch.Of(worker)).Run(keys[static_cast<size_t>(i)]);
  });
}

}  // namespace longspan::ops::cpu
