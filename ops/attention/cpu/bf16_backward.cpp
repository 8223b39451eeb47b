#include <algorithm>
#include <array>
#include <span>

#include "ops/attention/cpu/bf16_blocks.h"
#include "ops/attention/cpu/bf16_pieces.h"
#include "ops/attention/token_sets.h"
#include "ops/core/allocator.h"
#include "ops/core/parallel_for.h"

// Scores and their gradients dS are computed once, by tasks that own (part of) a column of blocks
// and sum up its dK and dV; the dS are kept in bf16 until tasks that own a row of blocks have made
// dQ of them. That happens piece by piece of the mask, so that memory stays bounded, in an order
// that depends on shapes alone; there are no atomics.
namespace longspan::ops::cpu {
namespace {

struct Backward {
  const Bf16Kernels& kernels;
  const Bf16Shape shape;
  const BackwardArgs& args;
  const std::vector<int64_t> query_tokens;  // by block id
  const KeyColumns keys;
  const RowStatistics statistics;

  int dim() const { return static_cast<int>(shape.dim); }
  int32_t KeyBlock(int32_t column) const {
    return args.mask.keys().ids[static_cast<size_t>(column)];
  }
  int64_t Tokens(int32_t block) const {
    return BlockTokens(args.mask.documents().row_length, block);
  }

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
  void Scores(const OperandRows& rows, int64_t tokens, const uint16_t* lanes, float* scores,
              const Bf16Ahead& ahead) const {
    Multiply(kernels, rows, lanes, dim(), scores, tokens, false, ahead);
  }
  // to [head_dim][lanes] (+)= columns . pairs, summed over the products.
  void Accumulate(std::span<const Bf16Product> products, bool add, float* to) const {
    kernels.gemm({.products = products.data(),
                  .count = static_cast<int>(products.size()),
                  .a_row = kMaskBlock,
                  .c = to,
                  .rows = dim(),
                  .add = add});
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
  void GradientByKey(const Bf16Gradient& step) const {
    args.normalization == Normalization::kSigmoid ? kernels.sigmoid_gradient_by_key(step)
                                                  : kernels.gradient_by_key(step);
  }
  // A [2][padded][64] result of a column to where its dK and dV go.
  void AddKeyGradients(const float* dk_dv, int64_t kv_head, int32_t column) const {
    const int32_t key = KeyBlock(column);
    const int64_t offset = args.dkv.Offset(kv_head, key), stride = args.dkv.token_stride();
    AddRows(dk_dv, Tokens(key), static_cast<float>(args.scale), args.dkv.dk.data<float>() + offset,
            stride);
    AddRows(dk_dv + shape.result(), Tokens(key), 1.0f, args.dkv.dv.data<float>() + offset, stride);
  }
};

// ---- dK, dV and dS of part of a column: lanes are keys -----------------------------------------

// Tiles whose shares of dK and dV are summed up before the sums, which do not fit the first cache,
// are read and written.
constexpr int kTilesAtOnce = 4;

int64_t PieceFloats(const Bf16Shape& shape) {
  return (4 + 2 * kTilesAtOnce) * shape.operand() + 2 * shape.result() + 2 * Bf16Shape::kScores +
         (1 + 2 * kTilesAtOnce) * Bf16Shape::kPairs;
}

class PieceTask {
 public:
  PieceTask(const Backward& call, const MaskPart& part, const MaskPiece& piece,
            Scratch::Cursor scratch)
      : b_(call),
        part_(part),
        piece_(piece),
        key_(call.KeyBlock(piece.column)),
        keys_(call.Tokens(key_)) {
    const Bf16Shape& shape = call.shape;
    for (uint16_t** operand : {&k_lanes_, &v_lanes_, &q_rows_, &d_out_rows_}) {
      *operand = Halves(scratch.Take(shape.operand()));
    }
    q_columns_ = Halves(scratch.Take(kTilesAtOnce * shape.operand()));
    d_out_columns_ = Halves(scratch.Take(kTilesAtOnce * shape.operand()));
    dk_dv_ = scratch.Take(2 * shape.result());
    s_ = scratch.Take(Bf16Shape::kScores);
    dp_ = scratch.Take(Bf16Shape::kScores);
    p_ = Halves(scratch.Take(kTilesAtOnce * Bf16Shape::kPairs));
    ds_ = Halves(scratch.Take(kTilesAtOnce * Bf16Shape::kPairs));
    ds_rows_ = Halves(scratch.Take(Bf16Shape::kPairs));
  }

  // Leaves dS in `tiles` and adds dK and dV to their place, or, where other tasks share it, leaves
  // them in `shared`.
  void Run(uint16_t* tiles, float* shared) {
    const KernelTask running(b_.kernels);
    if (piece_.shared >= 0) dk_dv_ = shared + piece_.shared * 2 * b_.shape.result();
    b_.ToLanes(b_.KeyRows(b_.args.kv.k, piece_.kv_head, key_, keys_, q_rows_), k_lanes_);
    b_.ToLanes(b_.KeyRows(b_.args.kv.v, piece_.kv_head, key_, keys_, q_rows_), v_lanes_);
    const std::span<const PieceEntry> entries = part_.EntriesOf(piece_);
    // A short block has lanes without a key. Their scores are 0, which may be far above lse, and
    // their dS must be finite.
    uint64_t lanes[64];
    std::fill(lanes, lanes + 64, ~uint64_t{0} >> (kMaskBlock - keys_));
    for (const PieceEntry& entry : entries) {
      uint64_t visible[64];
      const uint64_t* bits = keys_ < kMaskBlock ? lanes : nullptr;
      if (entry.partial) {
        bits = visible;
        const BlockMask& mask = b_.args.mask;
        VisibleBitsOfQueries(mask.rule(), mask.documents(), mask.rule_head(piece_.kv_head),
                             entry.query, key_, visible);
      }
      for (int64_t g = 0; g < b_.shape.group; ++g) {
        const int64_t tile = part_.TileOf(piece_, entry) + g;
        const bool last_head = g + 1 == b_.shape.group;
        const PieceEntry* next = !last_head                  ? &entry
                                 : &entry != &entries.back() ? &entry + 1
                                                             : nullptr;
        Step(entry, bits, g, next, tiles + tile * 2 * Bf16Shape::kPairs);
        if (waiting_ == kTilesAtOnce) AddWaiting();
      }
    }
    if (waiting_ > 0) AddWaiting();
    if (piece_.shared < 0) b_.AddKeyGradients(dk_dv_, piece_.kv_head, piece_.column);
  }

 private:
  // What Step will read of a query head's block of `t`.
  Bf16Ahead Ahead(const Tensor& t, const PieceEntry& entry, int64_t g) const {
    const int64_t token = b_.query_tokens[static_cast<size_t>(entry.query)];
    const int64_t head = piece_.kv_head * b_.shape.group + g,
                  stride = b_.shape.heads * b_.shape.dim;
    return AheadOf(t, token * stride + head * b_.shape.dim, stride, b_.shape.dim,
                   b_.Tokens(entry.query));
  }
  // dS of a tile goes to `tile`; its shares of dK and dV wait for AddWaiting. The next tile is that
  // of the next query head of the group, or of the first one and entry `next` (null: none).
  void Step(const PieceEntry& entry, const uint64_t* bits, int64_t g, const PieceEntry* next,
            uint16_t* tile) {
    const int64_t token = b_.query_tokens[static_cast<size_t>(entry.query)];
    const int64_t tokens = b_.Tokens(entry.query);
    const int64_t h = piece_.kv_head * b_.shape.group + g;
    const OperandRows q = b_.QueryRows(b_.args.q, token, tokens, h, q_rows_);
    const OperandRows d_out = b_.QueryRows(b_.args.d_out, token, tokens, h, d_out_rows_);
    const int64_t operand = waiting_ * 2 * b_.shape.operand();
    const int64_t pairs = waiting_ * 2 * Bf16Shape::kPairs;
    Bf16Ahead next_q, next_d_out;
    if (next != nullptr) {
      const int64_t next_g = (g + 1) % b_.shape.group;
      next_q = Ahead(b_.args.q, *next, next_g);
      next_d_out = Ahead(b_.args.d_out, *next, next_g);
    }
    b_.Scores(q, tokens, k_lanes_, s_, next_q);
    b_.Scores(d_out, tokens, v_lanes_, dp_, next_d_out);
    b_.GradientByKey({.s = s_,
                      .dp = dp_,
                      .p = p_ + pairs,
                      .ds = ds_ + pairs,
                      .ds_rows = ds_rows_,
                      .rows = static_cast<int>(tokens),
                      .scale = static_cast<float>(b_.args.scale * kLog2E),
                      .bits = bits,
                      .lse = b_.statistics.Lse(entry.query, h),
                      .delta = b_.statistics.Delta(entry.query, h)});
    b_.ToColumns(d_out, d_out_columns_ + operand);
    b_.ToColumns(q, q_columns_ + operand);
    b_.kernels.to_lanes(ds_rows_, kMaskBlock, kMaskBlock, tile);
    dv_products_[waiting_] = {d_out_columns_ + operand, p_ + pairs, static_cast<int>(tokens)};
    dk_products_[waiting_] = {q_columns_ + operand, ds_ + pairs, static_cast<int>(tokens)};
    ++waiting_;
  }
  void AddWaiting() {
    const auto count = static_cast<size_t>(waiting_);
    b_.Accumulate(std::span(dv_products_).first(count), started_, dk_dv_ + b_.shape.result());
    b_.Accumulate(std::span(dk_products_).first(count), started_, dk_dv_);
    started_ = true;
    waiting_ = 0;
  }

  const Backward& b_;
  const MaskPart& part_;
  const MaskPiece& piece_;
  const int32_t key_;
  const int64_t keys_;
  uint16_t *k_lanes_, *v_lanes_, *q_rows_, *d_out_rows_, *q_columns_, *d_out_columns_;
  float *dk_dv_, *s_, *dp_;
  uint16_t *p_, *ds_, *ds_rows_;
  int waiting_ = 0;  // tiles
  bool started_ = false;
  std::array<Bf16Product, kTilesAtOnce> dv_products_, dk_products_;
};

// ---- dQ of a row: lanes are queries ------------------------------------------------------------

void RowTask(const Backward& b, const MaskPart& part, int64_t row, const uint16_t* tiles,
             Scratch::Cursor scratch) {
  const KernelTask running(b.kernels);
  const BlockList& queries = b.args.mask.queries();
  const auto index = static_cast<size_t>(row % queries.size());
  const int64_t kv_head = row / queries.size();
  const int64_t first = queries.token_begin[index];
  const int64_t tokens = queries.token_begin[index + 1] - first;
  float* dq = scratch.Take(b.shape.result());
  for (int64_t g = 0; g < b.shape.group; ++g) {
    const std::span<const RowTile> entries = part.TilesOfRow(row);
    std::array<Bf16Product, kTilesAtOnce> products;
    for (size_t begin = 0; begin < entries.size(); begin += kTilesAtOnce) {
      const size_t count = std::min<size_t>(kTilesAtOnce, entries.size() - begin);
      for (size_t i = 0; i < count; ++i) {
        const RowTile& tile = entries[begin + i];
        const int32_t key = b.KeyBlock(tile.column);
        products[i] = {b.keys.Of(kv_head, key), tiles + (tile.tile + g) * 2 * Bf16Shape::kPairs,
                       static_cast<int>(b.Tokens(key))};
      }
      b.Accumulate(std::span(products).first(count), begin > 0, dq);
    }
    const int64_t stride = b.shape.heads * b.shape.dim;
    b.AddRows(
        dq, tokens, static_cast<float>(b.args.scale),
        b.args.dq.data<float>() + first * stride + (kv_head * b.shape.group + g) * b.shape.dim,
        stride);
  }
}

}  // namespace

RowStatistics::RowStatistics(Context& ctx, const BackwardArgs& args)
    : heads_(args.q.dim(1)),
      index_(IndexByBlock(args.mask.documents(), args.mask.queries())),
      values_(ctx.Empty({args.mask.queries().size() * heads_, 2, kMaskBlock}, DType::kF32)) {
  const BlockList& queries = args.mask.queries();
  ParallelFor(ctx, queries.size(), [&](int64_t i, int) {
    const int64_t first = queries.token_begin[static_cast<size_t>(i)];
    const int64_t tokens = queries.token_begin[static_cast<size_t>(i) + 1] - first;
    for (int64_t h = 0; h < heads_; ++h) {
      float* lse = values_.data<float>() + (i * heads_ + h) * 2 * kMaskBlock;
      LoadRowStatistics(args, first, tokens, h, lse, lse + kMaskBlock);
    }
  });
}

size_t Bf16BackwardScratch(int64_t heads, int64_t head_dim, const BlockMask& mask) {
  const Bf16Shape shape = MakeBf16Shape(heads, mask.kv_heads(), head_dim);
  const MaskParts parts(mask, shape.group);
  const auto block = [](int64_t elements, DType dtype) {
    return Allocator::BlockBytes(static_cast<size_t>(elements) * SizeOf(dtype));
  };
  return block(shape.kv_heads * mask.keys().size() * kMaskBlock * shape.padded, DType::kBF16) +
         block(mask.queries().size() * heads * 2 * kMaskBlock, DType::kF32) +
         block(parts.most_tiles() * kMaskBlock * kMaskBlock, DType::kBF16) +
         block(parts.most_shared() * 2 * shape.result(), DType::kF32);
}

void Bf16Backward(Context& ctx, const Bf16Kernels& kernels, const BackwardArgs& args) {
  const Bf16Shape shape = MakeBf16Shape(args.q.dim(1), args.kv.kv_heads(), args.kv.head_dim);
  const Backward b{kernels,
                   shape,
                   args,
                   QueryTokenOffsets(args.mask),
                   KeyColumns(ctx, kernels, shape, args.kv, args.kv.k, args.mask),
                   RowStatistics(ctx, args)};
  MaskParts parts(args.mask, shape.group);
  const Scratch scratch(ctx, PieceFloats(shape));
  const Tensor tiles = ctx.Empty({parts.most_tiles(), kMaskBlock * kMaskBlock}, DType::kBF16);
  const Tensor shared = ctx.Empty({parts.most_shared(), 2 * shape.result()}, DType::kF32);
  auto* ds = reinterpret_cast<uint16_t*>(tiles.data<BF16>());
  for (MaskPart part; parts.Next(part);) {
    ParallelFor(ctx, part.piece_count(), [&](int64_t i, int worker) {
      PieceTask(b, part, part.PieceBySize(i), scratch.Of(worker)).Run(ds, shared.data<float>());
    });
    const int64_t columns = part.shared_column_count();
    ParallelFor(ctx, columns + part.row_count(), [&](int64_t i, int worker) {
      if (i >= columns) {
        return RowTask(b, part, part.RowBySize(i - columns), ds, scratch.Of(worker));
      }
      for (const MaskPiece& piece : part.SharedColumn(i)) {
        b.AddKeyGradients(shared.data<float>() + piece.shared * 2 * shape.result(), piece.kv_head,
                          piece.column);
      }
    });
  }
}

}  // namespace longspan::ops::cpu
