#include <array>
#include <limits>

#include "ops/attention/cpu/routed_blocked.h"
#include "ops/core/parallel_for.h"

// Gates by tiles of 64 queries and 64 blocks, of which only the best `width` are kept.
namespace longspan::ops::cpu {
namespace {

constexpr int64_t kTileBlocks = 64;

// The best blocks so far of 64 queries, place by place in descending order. Queries are the lanes
// of every loop, so that compilers turn them into vector code.
class BestBlocks {
 public:
  explicit BestBlocks(int64_t width)
      : gate_(static_cast<size_t>(width)), block_(static_cast<size_t>(width)) {}

  void Reset() {
    for (Gates& place : gate_) place.fill(kNothing);
  }

  // `gates`: one block's gates of all queries. Blocks come in ascending order.
  void Offer(int32_t block, const float* gates) {
    const Gates& worst = gate_.back();
    int any = 0;  // few blocks are among the best of any query
    for (int q = 0; q < 64; ++q) {
      any |= static_cast<int>(!(gates[q] <= worst[q])) | static_cast<int>(worst[q] == kNothing);
    }
    if (any == 0) return;
    Gates gate;
    Blocks number;
    Flags moved{};  // whether what is held belongs before all that follows
    for (int q = 0; q < 64; ++q) {
      // NaN is above all, and nothing as low as an empty place.
      const float low = gates[q] < kLowest ? kLowest : gates[q];
      gate[q] = low == low ? low : kHighest;
      number[q] = block;
    }
    for (size_t place = 0; place < gate_.size(); ++place) {
      Gates& held_gate = gate_[place];
      Blocks& held_block = block_[place];
      for (int q = 0; q < 64; ++q) {
        // An equal gate of a lower block stays where it is.
        moved[q] |= static_cast<int32_t>(gate[q] > held_gate[q]);
        const float g = held_gate[q];
        const int32_t b = held_block[q];
        held_gate[q] = moved[q] != 0 ? gate[q] : g;
        held_block[q] = moved[q] != 0 ? number[q] : b;
        gate[q] = moved[q] != 0 ? g : gate[q];
        number[q] = moved[q] != 0 ? b : number[q];
      }
    }
  }

  // The blocks in ascending order; at least as many as there are places have been offered.
  void Write(int query, int32_t* to) const {
    for (size_t place = 0; place < block_.size(); ++place) {
      to[place] = block_[place][static_cast<size_t>(query)];
    }
    std::sort(to, to + block_.size());
  }

 private:
  using Gates = std::array<float, 64>;
  using Blocks = std::array<int32_t, 64>;
  using Flags = std::array<int32_t, 64>;
  static constexpr float kHighest = std::numeric_limits<float>::infinity();
  static constexpr float kLowest = -std::numeric_limits<float>::max();
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();  // an empty place

  std::vector<Gates> gate_;
  std::vector<Blocks> block_;
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

  void Run(const RoutedTile& tile) {
    for (int64_t h = 0; h < shape_.heads; ++h) {
      if (tile.candidates > width_) RankBlocks(tile, h);
      for (int64_t t = tile.begin; t < tile.begin + tile.tokens; ++t) {
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
  void RankBlocks(const RoutedTile& tile, int64_t head) {
    const int64_t stride = shape_.heads * shape_.dim, tokens = tile.tokens;
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
  const BlockedShape shape = RoutedShape(args.q, args.means.dim(1));
  const std::vector<RoutedTile>& tiles = args.queries.tiles;
  const Scratch scratch(ctx, shape.packed() + shape.lanes() + kTileBlocks * 64);
  std::vector<BestBlocks> best(static_cast<size_t>(ctx.threads()),
                               BestBlocks(args.selected.dim(2)));
  ParallelFor(ctx, static_cast<int64_t>(tiles.size()), [&](int64_t i, int worker) {
    GateTask(kernels, shape, args, scratch.Of(worker), best[static_cast<size_t>(worker)])
        .Run(tiles[static_cast<size_t>(i)]);
  });
}

}  // namespace longspan::ops::cpu
