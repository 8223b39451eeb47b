#include <cmath>
#include <limits>

#include "ops/attention/cpu/routed_blocked.h"
#include "ops/core/parallel_for.h"

// Gates by tiles of 64 queries and 64 blocks, of which only the best `width` are kept.
namespace longspan::ops::cpu {
namespace {

constexpr int64_t kTileBlocks = 64;

// Up to 64 queries of one block, so that all have the same candidates.
struct QueryTile {
  int64_t begin, end;         // tokens
  int64_t first, candidates;  // blocks
};

std::vector<QueryTile> TilesOf(const RoutedBlocks& blocks) {
  std::vector<QueryTile> tiles;
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const size_t i = static_cast<size_t>(b);
    for (int64_t t = blocks.begin[i]; t < blocks.begin[i + 1]; t += 64) {
      tiles.push_back({t, std::min(t + 64, blocks.begin[i + 1]), blocks.first_candidate[i],
                       blocks.CandidatesOf(b)});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const QueryTile& a, const QueryTile& b) {
    return a.candidates > b.candidates;
  });
  return tiles;
}

// The best blocks so far of 64 queries, each a list of `width` places in descending order.
class BestBlocks {
 public:
  explicit BestBlocks(int64_t width)
      : width_(width),
        gate_(static_cast<size_t>(64 * width)),
        block_(static_cast<size_t>(64 * width)) {}

  void Reset() { filled_ = 0; }

  // `gates`: one block's gates of all 64 queries. Blocks come in ascending order.
  void Offer(int32_t block, const float* gates) {
    if (filled_ < width_) {
      for (int lane = 0; lane < 64; ++lane) Insert(lane, filled_, block, Ranked(gates[lane]));
      ++filled_;
    } else {
      int any = 0;  // few blocks are among the best of any query
      for (int lane = 0; lane < 64; ++lane) any |= static_cast<int>(!(gates[lane] <= worst_[lane]));
      if (any == 0) return;
      for (int lane = 0; lane < 64; ++lane) {
        const float gate = Ranked(gates[lane]);
        if (gate > worst_[lane]) Insert(lane, width_ - 1, block, gate);
      }
    }
    if (filled_ == width_) UpdateWorst();
  }

  // The blocks in ascending order; at least `width` have been offered.
  void Write(int lane, int32_t* to) {
    int32_t* blocks = block_.data() + lane * width_;
    std::sort(blocks, blocks + width_);
    std::copy(blocks, blocks + width_, to);
  }

 private:
  static float Ranked(float gate) {
    return std::isnan(gate) ? std::numeric_limits<float>::infinity() : gate;
  }
  // Into the list whose last place, `last`, is free or given up; behind equal gates, which belong
  // to lower blocks.
  void Insert(int lane, int64_t last, int32_t block, float gate) {
    float* gates = gate_.data() + lane * width_;
    int32_t* blocks = block_.data() + lane * width_;
    int64_t at = last;
    for (; at > 0 && gates[at - 1] < gate; --at) {
      gates[at] = gates[at - 1];
      blocks[at] = blocks[at - 1];
    }
    gates[at] = gate;
    blocks[at] = block;
  }
  void UpdateWorst() {
    for (int lane = 0; lane < 64; ++lane) {
      worst_[lane] = gate_[static_cast<size_t>((lane + 1) * width_ - 1)];
    }
  }

  const int64_t width_;
  int64_t filled_ = 0;
  std::vector<float> gate_;     // [64, width]
  std::vector<int32_t> block_;  // [64, width]
  float worst_[64] = {};
};

class GateTask {
 public:
  GateTask(const BlockKernels& kernels, const BlockedShape& shape, const RouteArgs& args,
           Scratch::Cursor scratch, BestBlocks& best)
      : kernels_(kernels),
        shape_(shape),
        args_(args),
        width_(args.selected.dim(2)),
        rows_(scratch.Take(shape.packed())),
        lanes_(scratch.Take(shape.lanes())),
        gates_(scratch.Take(kTileBlocks * 64)),
        best_(best) {}

  void Run(const QueryTile& tile) {
    for (int64_t h = 0; h < shape_.heads; ++h) {
      if (tile.candidates > width_) RankBlocks(tile, h);
      for (int64_t t = tile.begin; t < tile.end; ++t) {
        int32_t* to = args_.selected.data<int32_t>() + (h * args_.q.dim(0) + t) * width_;
        if (tile.candidates > width_) {
          best_.Write(static_cast<int>(t - tile.begin), to);
          continue;
        }
        for (int64_t n = 0; n < width_; ++n) {
          to[n] = n < tile.candidates ? static_cast<int32_t>(tile.first + n) : -1;
        }
      }
    }
  }

 private:
  void RankBlocks(const QueryTile& tile, int64_t head) {
    const int64_t stride = shape_.heads * shape_.dim, tokens = tile.end - tile.begin;
    PackBlock(kernels_, shape_, args_.q, tile.begin * stride + head * shape_.dim, stride, tokens,
              rows_);
    TransposeTo(kernels_, shape_, rows_, tokens, lanes_);
    best_.Reset();
    for (int64_t done = 0; done < tile.candidates; done += kTileBlocks) {
      const int64_t first = tile.first + done, n = std::min(kTileBlocks, tile.candidates - done);
      kernels_.gemm({.a = args_.means.data<float>() +
                          (first * shape_.kv_heads + head / shape_.group) * shape_.dim,
                     .a_row = shape_.kv_heads * shape_.dim,
                     .a_inner = 1,
                     .b = lanes_,
                     .ldb = 64,
                     .c = gates_,
                     .ldc = 64,
                     .rows = static_cast<int>(n),
                     .columns = 64,
                     .inner = static_cast<int>(shape_.dim),
                     .row_scale = nullptr});
      for (int64_t b = 0; b < n; ++b) {
        best_.Offer(static_cast<int32_t>(first + b), gates_ + b * 64);
      }
    }
  }

  const BlockKernels& kernels_;
  const BlockedShape& shape_;
  const RouteArgs& args_;
  const int64_t width_;
  float *rows_, *lanes_, *gates_;  // [64][ld], [dim][64], [blocks][64]
  BestBlocks& best_;
};

}  // namespace

void BlockedRoute(Context& ctx, const BlockKernels& kernels, const RouteArgs& args) {
  const BlockedShape shape = RoutedShape(args.q, args.means);
  const std::vector<QueryTile> tiles = TilesOf(args.blocks);
  const Scratch scratch(ctx, shape.packed() + shape.lanes() + kTileBlocks * 64);
  std::vector<BestBlocks> best(static_cast<size_t>(ctx.threads()),
                               BestBlocks(args.selected.dim(2)));
  ParallelFor(ctx, static_cast<int64_t>(tiles.size()), [&](int64_t i, int worker) {
    GateTask(kernels, shape, args, scratch.Of(worker), best[static_cast<size_t>(worker)])
        .Run(tiles[static_cast<size_t>(i)]);
  });
}

}  // namespace longspan::ops::cpu
