#include <cmath>
#include <limits>

#include "ops/attention/cpu/routed_blocked.h"
#include "ops/core/parallel_for.h"

// A task owns the rows of a segment and kv head and goes through the key blocks in ascending order:
// the rows that chose a block are gathered with what they have so far, 64 at a time, and put back.
namespace longspan::ops::cpu {
namespace {

int64_t WorkerFloats(const BlockedShape& shape) {
  const int64_t pieces = kChunkKeys / 64;
  return (2 * pieces + 2) * shape.packed() + shape.lanes() + BlockedShape::kTile + 3 * 64;
}

class SegmentTask {
 public:
  SegmentTask(const BlockKernels& kernels, const BlockedShape& shape, const RoutedForwardArgs& args,
              Scratch::Cursor scratch, GatherClock& clock)
      : kernels_(kernels), shape_(shape), args_(args), clock_(clock) {
    k_ = scratch.Take(kChunkKeys / 64 * shape.packed());
    v_ = scratch.Take(kChunkKeys / 64 * shape.packed());
    rows_ = scratch.Take(shape.packed());
    o_ = scratch.Take(shape.packed());
    q_lanes_ = scratch.Take(shape.lanes());
    scores_ = scratch.Take(BlockedShape::kTile);
    maximum_ = scratch.Take(64);
    sum_ = scratch.Take(64);
    rescale_ = scratch.Take(64);
  }

  void Run(const Segment& segment) {
    std::vector<FlatRow> listed;
    for (int64_t block = segment.first_block; block < segment.last_block; ++block) {
      clock_.Time([&] { RowsOfSegment(args_.lists, segment, block, shape_.group, listed); });
      if (listed.empty()) continue;
      ForEachChunk(args_.kv, args_.blocks, segment.kv_head, block, [&](const KeyChunk& chunk) {
        PackChunk(chunk);
        for (size_t at = 0; at < listed.size(); at += 64) {
          Tile(chunk, std::span(listed).subspan(at, std::min<size_t>(64, listed.size() - at)));
        }
      });
    }
  }

 private:
  void PackChunk(const KeyChunk& chunk) {
    const int64_t stride = args_.kv.token_stride();
    for (int64_t p = 0; p < chunk.pieces(); ++p) {
      const int64_t at = chunk.offset + p * 64 * stride, keys = chunk.KeysOf(p);
      PackBlock(kernels_, shape_, args_.kv.k, at, stride, keys, k_ + p * shape_.packed());
      PackBlock(kernels_, shape_, args_.kv.v, at, stride, keys, v_ + p * shape_.packed());
    }
  }

  void Tile(const KeyChunk& chunk, std::span<const FlatRow> rows) {
    clock_.Time([&] { Gather(rows); });
    for (int64_t p = 0; p < chunk.pieces(); ++p) Piece(p, chunk.KeysOf(p), rows.size());
    clock_.Time([&] { PutBack(rows); });
  }

  // The rows' results so far: o is their weighted mean of values, lse the logarithm of the weights.
  void Gather(std::span<const FlatRow> rows) {
    GatherRows(kernels_, shape_, args_.q, rows, rows_);
    TransposeTo(kernels_, shape_, rows_, static_cast<int64_t>(rows.size()), q_lanes_);
    GatherRows(kernels_, shape_, args_.o, rows, o_);
    for (size_t i = 0; i < rows.size(); ++i) {
      maximum_[i] =
          static_cast<float>(kLog2E * static_cast<double>(args_.lse.data<float>()[rows[i]]));
      sum_[i] = 1;
    }
    std::fill(maximum_ + rows.size(), maximum_ + 64, -std::numeric_limits<float>::infinity());
    std::fill(sum_ + rows.size(), sum_ + 64, 0.0f);
  }

  void Piece(int64_t piece, int64_t keys, size_t rows) {
    kernels_.gemm({.a = k_ + piece * shape_.packed(),
                   .a_row = shape_.ld,
                   .a_inner = 1,
                   .b = q_lanes_,
                   .ldb = 64,
                   .c = scores_,
                   .ldc = 64,
                   .rows = static_cast<int>(keys),
                   .columns = 64,
                   .inner = static_cast<int>(shape_.dim),
                   .row_scale = nullptr});
    kernels_.softmax({.s = scores_,
                      .keys = static_cast<int>(keys),
                      .scale = static_cast<float>(args_.scale * kLog2E),
                      .bits = nullptr,
                      .maximum = maximum_,
                      .sum = sum_,
                      .rescale = rescale_});
    kernels_.gemm({.a = scores_,
                   .a_row = 1,
                   .a_inner = 64,
                   .b = v_ + piece * shape_.packed(),
                   .ldb = shape_.ld,
                   .c = o_,
                   .ldc = shape_.ld,
                   .rows = static_cast<int>(rows),
                   .columns = static_cast<int>(shape_.padded),
                   .inner = static_cast<int>(keys),
                   .row_scale = rescale_});
  }

  void PutBack(std::span<const FlatRow> rows) {
    for (size_t i = 0; i < rows.size(); ++i) {
      const float scale = 1.0f / sum_[i];
      const float* from = o_ + static_cast<int64_t>(i) * shape_.ld;
      float* to = args_.o.data<float>() + rows[i] * shape_.dim;
      for (int64_t d = 0; d < shape_.dim; ++d) to[d] = scale * from[d];
      args_.lse.data<float>()[rows[i]] = static_cast<float>(
          kLn2 * static_cast<double>(maximum_[i]) + std::log(static_cast<double>(sum_[i])));
    }
  }

  const BlockKernels& kernels_;
  const BlockedShape& shape_;
  const RoutedForwardArgs& args_;
  GatherClock& clock_;
  float *k_, *v_;     // of a chunk
  float *rows_, *o_;  // [64][ld]
  float* q_lanes_;    // [dim][64]
  float* scores_;     // [64 keys][64]
  float *maximum_, *sum_, *rescale_;
};

}  // namespace

void BlockedRoutedForward(Context& ctx, const BlockKernels& kernels,
                          const RoutedForwardArgs& args) {
  const BlockedShape shape = RoutedShape(args.q, args.kv.kv_heads());
  const std::vector<Segment> segments = SegmentsOf(args.queries, args.lists, shape.kv_heads);
  const Scratch scratch(ctx, WorkerFloats(shape));
  GatherClock clock(ctx);
  ParallelFor(ctx, static_cast<int64_t>(segments.size()), [&](int64_t i, int worker) {
    SegmentTask(kernels, shape, args, scratch.Of(worker), clock)
        .Run(segments[static_cast<size_t>(i)]);
  });
}

}  // namespace longspan::ops::cpu
