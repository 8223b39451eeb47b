#include <cmath>
#include <cstring>
#include <limits>

#include "ops/attention/cpu/bf16_blocks.h"
#include "ops/attention/cpu/routed_blocked.h"
#include "ops/attention/merge.h"
#include "ops/core/parallel_for.h"

// The passes of routed_forward.cpp and routed_backward.cpp with bf16 operands. Queries (forward,
// dQ) or keys (dK, dV) are the lanes of every result.
namespace longspan::ops::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPieces = kChunkKeys / 64, kGradientPieces = kGradientKeys / 64;

// One call: what all its tasks share, and the products.
struct Call {
  const Bf16Kernels& kernels;
  const Bf16Shape shape;
  GatherClock& clock;

  int dim() const { return static_cast<int>(shape.dim); }
  int padded() const { return static_cast<int>(shape.padded); }

  // Piece p of a chunk's keys (or values) as complete rows.
  void KeyRows(const Tensor& from, const KvView& kv, const KeyChunk& chunk, int64_t p,
               uint16_t* to) const {
    const int64_t stride = kv.token_stride();
    kernels.copy_rows(
        reinterpret_cast<const uint16_t*>(from.data<BF16>()) + chunk.offset + p * 64 * stride,
        stride, static_cast<int>(chunk.KeysOf(p)), dim(), padded(), to);
  }
  // Listed rows as complete rows, zero past the last; f32 is rounded.
  void Gather(const Tensor& from, std::span<const FlatRow> rows, uint16_t* to) const {
    for (size_t i = 0; i < 64; ++i, to += shape.padded) {
      const int64_t filled = i < rows.size() ? shape.dim : 0;
      if (filled > 0 && from.dtype() == DType::kBF16) {
        std::memcpy(to, from.data<BF16>() + rows[i] * shape.dim,
                    static_cast<size_t>(filled) * sizeof(BF16));
      } else if (filled > 0) {
        const float* row = from.data<float>() + rows[i] * shape.dim;
        for (int64_t d = 0; d < filled; ++d) to[d] = BF16(row[d]).bits;
      }
      std::fill(to + filled, to + shape.padded, uint16_t{0});
    }
  }
  // Operand p of several that follow each other.
  uint16_t* Piece(uint16_t* operands, int64_t p) const {
    return operands + p * 2 * shape.operand();
  }
  void ToLanes(const uint16_t* rows, uint16_t* to) const {
    kernels.to_lanes(rows, shape.padded, padded(), to);
  }
  void ToColumns(const uint16_t* rows, uint16_t* to) const {
    kernels.to_columns(rows, shape.padded, padded(), to);
  }
  // scores [count][lanes] = rows . lanes over head_dim.
  void Scores(const uint16_t* rows, int64_t count, const uint16_t* lanes, float* scores) const {
    Multiply(kernels, {rows, shape.padded}, lanes, dim(), scores, count, false);
  }
  // to [head_dim][lanes] += columns . pairs over `count` tokens.
  void Accumulate(const uint16_t* columns, const uint16_t* pairs, int64_t count, float* to) const {
    Multiply(kernels, {columns, 64}, pairs, count, to, dim(), true);
  }
};

// Of the forward or backward arguments.
template <class Args>
Bf16Shape ShapeOf(const Args& args) {
  return MakeBf16Shape(args.q.dim(1), args.kv.kv_heads(), args.q.dim(2));
}

// Calls task.PrepareKeys(KeyChunk) and then task.Tile(KeyChunk, rows) for the rows of the segment
// that chose it, key blocks ascending.
template <class Args, class Task>
void ForEachTileOf(const Segment& segment, const Args& args, const Call& call, Task& task) {
  const KernelTask running(call.kernels);
  std::vector<FlatRow> listed;
  for (int64_t block = segment.first_block; block < segment.last_block; ++block) {
    call.clock.Time([&] { RowsOfSegment(args.lists, segment, block, call.shape.group, listed); });
    if (listed.empty()) continue;
    ForEachChunk(args.kv, args.blocks, segment.kv_head, block, [&](const KeyChunk& keys) {
      task.PrepareKeys(keys);
      for (size_t at = 0; at < listed.size(); at += 64) {
        task.Tile(keys, std::span(listed).subspan(at, std::min<size_t>(64, listed.size() - at)));
      }
    });
  }
}

// ---- forward ---------------------------------------------------------------------------------

int64_t ForwardFloats(const Bf16Shape& shape) {
  return (2 * kPieces + 2) * shape.operand() + 2 * shape.result() + Bf16Shape::kScores +
         Bf16Shape::kPairs + 4 * 64;
}

class ForwardTask {
 public:
  ForwardTask(const Call& call, const RoutedForwardArgs& args, Scratch::Cursor scratch)
      : call_(call), args_(args) {
    const Bf16Shape& shape = call.shape;
    k_ = Halves(scratch.Take(kPieces * shape.operand()));
    v_columns_ = Halves(scratch.Take(kPieces * shape.operand()));
    rows_ = Halves(scratch.Take(shape.operand()));
    q_lanes_ = Halves(scratch.Take(shape.operand()));
    o_ = scratch.Take(shape.result());
    out_ = scratch.Take(shape.result());
    scores_ = scratch.Take(Bf16Shape::kScores);
    p_ = Halves(scratch.Take(Bf16Shape::kPairs));
    maximum_ = scratch.Take(64);
    sum_ = scratch.Take(64);
    weight_ = scratch.Take(64);
    rescale_ = scratch.Take(64);
  }

  void Run(const Segment& segment) { ForEachTileOf(segment, args_, call_, *this); }

  void PrepareKeys(const KeyChunk& chunk) {
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      call_.KeyRows(args_.kv.k, args_.kv, chunk, p, call_.Piece(k_, p));
      call_.KeyRows(args_.kv.v, args_.kv, chunk, p, rows_);
      call_.ToColumns(rows_, call_.Piece(v_columns_, p));
    }
  }

  // The chunk's own result for the rows, which is then merged into theirs.
  void Tile(const KeyChunk& chunk, std::span<const FlatRow> rows) {
    call_.clock.Time([&] {
      call_.Gather(args_.q, rows, rows_);
      call_.ToLanes(rows_, q_lanes_);
    });
    std::fill(o_, o_ + call_.shape.result(), 0.0f);
    std::fill(maximum_, maximum_ + 64, -kInfinity);
    std::fill(sum_, sum_ + 64, 0.0f);
    std::fill(weight_, weight_ + 64, 0.0f);
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      const int64_t keys = chunk.KeysOf(p);
      call_.Scores(call_.Piece(k_, p), keys, q_lanes_, scores_);
      const bool raised = call_.kernels.softmax({.s = scores_,
                                                 .p = p_,
                                                 .keys = static_cast<int>(keys),
                                                 .scale = static_cast<float>(args_.scale * kLog2E),
                                                 .bits = nullptr,
                                                 .maximum = maximum_,
                                                 .sum = sum_,
                                                 .weight = weight_,
                                                 .rescale = rescale_});
      if (raised) call_.kernels.scale_lanes(o_, call_.dim(), rescale_);
      call_.Accumulate(call_.Piece(v_columns_, p), p_, keys, o_);
    }
    call_.clock.Time([&] { Merge(rows); });
  }

 private:
  void Merge(std::span<const FlatRow> rows) {
    for (size_t i = 0; i < 64; ++i) rescale_[i] = i < rows.size() ? 1.0f / weight_[i] : 0.0f;
    const int64_t dim = call_.shape.dim;
    call_.kernels.store_f32({.from = o_,
                             .scale = rescale_,
                             .tokens = static_cast<int>(rows.size()),
                             .dim = call_.dim(),
                             .stride = dim},
                            out_);
    for (size_t i = 0; i < rows.size(); ++i) {
      float* o = args_.o.data<float>() + rows[i] * dim;
      float& lse = args_.lse.data<float>()[rows[i]];
      const float* part = out_ + static_cast<int64_t>(i) * dim;
      const auto lse_of_part = static_cast<float>(kLn2 * static_cast<double>(maximum_[i]) +
                                                  std::log(static_cast<double>(sum_[i])));
      const MergeWeights<float> w = WeightsOfParts(lse, lse_of_part);
      for (int64_t d = 0; d < dim; ++d) o[d] = w.a * o[d] + w.b * part[d];
      lse = w.lse;
    }
  }

  const Call& call_;
  const RoutedForwardArgs& args_;
  uint16_t *k_, *v_columns_;  // of a chunk
  uint16_t *rows_, *q_lanes_;
  float *o_, *out_;  // [head_dim][64], [64][head_dim]
  float* scores_;
  uint16_t* p_;
  float *maximum_, *sum_, *weight_, *rescale_;
};

// ---- dQ: lanes are queries -------------------------------------------------------------------

int64_t QueryGradientFloats(const Bf16Shape& shape) {
  return (3 * kPieces + 3) * shape.operand() + 2 * shape.result() + 2 * Bf16Shape::kScores +
         Bf16Shape::kPairs + 3 * 64;
}

class QueryGradientTask {
 public:
  QueryGradientTask(const Call& call, const RoutedBackwardArgs& args, Tensor& dq,
                    Scratch::Cursor scratch)
      : call_(call), args_(args), to_(dq) {
    const Bf16Shape& shape = call.shape;
    k_ = Halves(scratch.Take(kPieces * shape.operand()));
    v_ = Halves(scratch.Take(kPieces * shape.operand()));
    k_columns_ = Halves(scratch.Take(kPieces * shape.operand()));
    rows_ = Halves(scratch.Take(shape.operand()));
    q_lanes_ = Halves(scratch.Take(shape.operand()));
    d_out_lanes_ = Halves(scratch.Take(shape.operand()));
    dq_ = scratch.Take(shape.result());
    out_ = scratch.Take(shape.result());
    s_ = scratch.Take(Bf16Shape::kScores);
    dp_ = scratch.Take(Bf16Shape::kScores);
    ds_ = Halves(scratch.Take(Bf16Shape::kPairs));
    lse_ = scratch.Take(64);
    delta_ = scratch.Take(64);
    scales_ = scratch.Take(64);
    std::fill(scales_, scales_ + 64, static_cast<float>(args.scale));
  }

  void Run(const Segment& segment) { ForEachTileOf(segment, args_, call_, *this); }

  void PrepareKeys(const KeyChunk& chunk) {
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      call_.KeyRows(args_.kv.k, args_.kv, chunk, p, call_.Piece(k_, p));
      call_.KeyRows(args_.kv.v, args_.kv, chunk, p, call_.Piece(v_, p));
      call_.ToColumns(call_.Piece(k_, p), call_.Piece(k_columns_, p));
    }
  }

  void Tile(const KeyChunk& chunk, std::span<const FlatRow> rows) {
    call_.clock.Time([&] {
      call_.Gather(args_.q, rows, rows_);
      call_.ToLanes(rows_, q_lanes_);
      call_.Gather(args_.d_out, rows, rows_);
      call_.ToLanes(rows_, d_out_lanes_);
      LoadRowStatistics(args_, rows, lse_, delta_);
    });
    std::fill(dq_, dq_ + call_.shape.result(), 0.0f);
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      const int64_t keys = chunk.KeysOf(p);
      call_.Scores(call_.Piece(k_, p), keys, q_lanes_, s_);
      call_.Scores(call_.Piece(v_, p), keys, d_out_lanes_, dp_);
      call_.kernels.gradient_by_query({.s = s_,
                                       .dp = dp_,
                                       .p = nullptr,
                                       .ds = ds_,
                                       .rows = static_cast<int>(keys),
                                       .scale = static_cast<float>(args_.scale * kLog2E),
                                       .bits = nullptr,
                                       .lse = lse_,
                                       .delta = delta_});
      call_.Accumulate(call_.Piece(k_columns_, p), ds_, keys, dq_);
    }
    call_.clock.Time([&] { Add(rows); });
  }

 private:
  void Add(std::span<const FlatRow> rows) {
    const int64_t dim = call_.shape.dim;
    call_.kernels.store_f32({.from = dq_,
                             .scale = scales_,
                             .tokens = static_cast<int>(rows.size()),
                             .dim = call_.dim(),
                             .stride = dim},
                            out_);
    for (size_t i = 0; i < rows.size(); ++i) {
      float* to = to_.data<float>() + rows[i] * dim;
      const float* from = out_ + static_cast<int64_t>(i) * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] += from[d];
    }
  }

  const Call& call_;
  const RoutedBackwardArgs& args_;
  Tensor& to_;
  uint16_t *k_, *v_, *k_columns_;  // of a chunk
  uint16_t *rows_, *q_lanes_, *d_out_lanes_;
  float *dq_, *out_;  // [head_dim][64], [64][head_dim]
  float *s_, *dp_;
  uint16_t* ds_;
  float *lse_, *delta_, *scales_;
};

// ---- dK, dV: lanes are keys ------------------------------------------------------------------

int64_t KeyGradientFloats(const Bf16Shape& shape) {
  return (2 * kGradientPieces + 4) * shape.operand() + 2 * kGradientPieces * shape.result() +
         2 * Bf16Shape::kScores + 2 * Bf16Shape::kPairs + 3 * 64;
}

class KeyGradientTask {
 public:
  KeyGradientTask(const Call& call, const RoutedBackwardArgs& args, const KvGradView& dkv,
                  Scratch::Cursor scratch)
      : call_(call), args_(args), to_(dkv) {
    const Bf16Shape& shape = call.shape;
    k_lanes_ = Halves(scratch.Take(kGradientPieces * shape.operand()));
    v_lanes_ = Halves(scratch.Take(kGradientPieces * shape.operand()));
    q_ = Halves(scratch.Take(shape.operand()));
    d_out_ = Halves(scratch.Take(shape.operand()));
    q_columns_ = Halves(scratch.Take(shape.operand()));
    d_out_columns_ = Halves(scratch.Take(shape.operand()));
    dk_ = scratch.Take(kGradientPieces * shape.result());
    dv_ = scratch.Take(kGradientPieces * shape.result());
    s_ = scratch.Take(Bf16Shape::kScores);
    dp_ = scratch.Take(Bf16Shape::kScores);
    p_ = Halves(scratch.Take(Bf16Shape::kPairs));
    ds_ = Halves(scratch.Take(Bf16Shape::kPairs));
    lse_ = scratch.Take(64);
    delta_ = scratch.Take(64);
    scales_ = scratch.Take(64);
  }

  void Run(const KeyTask& task) {
    const KernelTask running(call_.kernels);
    const int64_t sums = call_.shape.result();
    const KeyChunk chunk = task.In(args_.kv);
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      call_.KeyRows(args_.kv.k, args_.kv, chunk, p, q_);
      call_.ToLanes(q_, call_.Piece(k_lanes_, p));
      call_.KeyRows(args_.kv.v, args_.kv, chunk, p, q_);
      call_.ToLanes(q_, call_.Piece(v_lanes_, p));
    }
    std::fill(dk_, dk_ + chunk.pieces() * sums, 0.0f);
    std::fill(dv_, dv_ + chunk.pieces() * sums, 0.0f);
    cpu::ForEachTileOf(task, args_.lists, call_.shape.group,
                       [&](std::span<const FlatRow> rows) { Tile(chunk, rows); });
    Add(task.In(to_), dk_, static_cast<float>(args_.scale), to_.dk);
    Add(task.In(to_), dv_, 1.0f, to_.dv);
  }

 private:
  void Tile(const KeyChunk& chunk, std::span<const FlatRow> rows) {
    call_.clock.Time([&] {
      call_.Gather(args_.q, rows, q_);
      call_.ToColumns(q_, q_columns_);
      call_.Gather(args_.d_out, rows, d_out_);
      call_.ToColumns(d_out_, d_out_columns_);
      LoadRowStatistics(args_, rows, lse_, delta_);
    });
    const int64_t sums = call_.shape.result();
    const auto n = static_cast<int64_t>(rows.size());
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      call_.Scores(q_, n, call_.Piece(k_lanes_, p), s_);
      call_.Scores(d_out_, n, call_.Piece(v_lanes_, p), dp_);
      call_.kernels.gradient_by_key({.s = s_,
                                     .dp = dp_,
                                     .p = p_,
                                     .ds = ds_,
                                     .rows = static_cast<int>(n),
                                     .scale = static_cast<float>(args_.scale * kLog2E),
                                     .bits = nullptr,
                                     .lse = lse_,
                                     .delta = delta_});
      call_.Accumulate(d_out_columns_, p_, n, dv_ + p * sums);
      call_.Accumulate(q_columns_, ds_, n, dk_ + p * sums);
    }
  }

  void Add(const KeyChunk& chunk, const float* from, float factor, const Tensor& to) {
    std::fill(scales_, scales_ + 64, factor);
    const int64_t stride = to_.token_stride();
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      call_.kernels.add_f32({.from = from + p * call_.shape.result(),
                             .scale = scales_,
                             .tokens = static_cast<int>(chunk.KeysOf(p)),
                             .dim = call_.dim(),
                             .stride = stride},
                            to.data<float>() + chunk.offset + p * 64 * stride);
    }
  }

  const Call& call_;
  const RoutedBackwardArgs& args_;
  const KvGradView& to_;
  uint16_t *k_lanes_, *v_lanes_;  // of all pieces
  uint16_t *q_, *d_out_, *q_columns_, *d_out_columns_;
  float *dk_, *dv_;  // [head_dim][64] of all pieces
  float *s_, *dp_;
  uint16_t *p_, *ds_;
  float *lse_, *delta_, *scales_;
};

}  // namespace

void Bf16RoutedForward(Context& ctx, const Bf16Kernels& kernels, const RoutedForwardArgs& args) {
  GatherClock clock(ctx);
  const Call call{kernels, ShapeOf(args), clock};
  const std::vector<Segment> segments = SegmentsOf(args.queries, args.lists, call.shape.kv_heads);
  const Scratch scratch(ctx, ForwardFloats(call.shape));
  ParallelFor(ctx, static_cast<int64_t>(segments.size()), [&](int64_t i, int worker) {
    ForwardTask(call, args, scratch.Of(worker)).Run(segments[static_cast<size_t>(i)]);
  });
}

void Bf16RoutedQueryGradient(Context& ctx, const Bf16Kernels& kernels,
                             const RoutedBackwardArgs& args, Tensor& dq) {
  GatherClock clock(ctx);
  const Call call{kernels, ShapeOf(args), clock};
  const std::vector<Segment> segments = SegmentsOf(args.queries, args.lists, call.shape.kv_heads);
  const Scratch scratch(ctx, QueryGradientFloats(call.shape));
  ParallelFor(ctx, static_cast<int64_t>(segments.size()), [&](int64_t i, int worker) {
    QueryGradientTask(call, args, dq, scratch.Of(worker)).Run(segments[static_cast<size_t>(i)]);
  });
}

void Bf16RoutedKeyGradient(Context& ctx, const Bf16Kernels& kernels, const RoutedBackwardArgs& args,
                           const KvGradView& dkv) {
  GatherClock clock(ctx);
  const Call call{kernels, ShapeOf(args), clock};
  const std::vector<KeyTask> keys = KeyTasks(args.blocks, args.lists, call.shape.kv_heads);
  const Scratch scratch(ctx, KeyGradientFloats(call.shape));
  ParallelFor(ctx, static_cast<int64_t>(keys.size()), [&](int64_t i, int worker) {
    KeyGradientTask(call, args, dkv, scratch.Of(worker)).Run(keys[static_cast<size_t>(i)]);
  });
}

}  // namespace longspan::ops::cpu
