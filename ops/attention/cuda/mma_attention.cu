// Host side of the tensor-core kernels, and what the backward pass prepares for them.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/cuda/mma_arguments.cuh"
#include "ops/attention/cuda/mma_shape.h"
#include "ops/core/cuda/launch.h"

namespace longspan::ops::internal {
namespace {

using mma::BackwardProblem;
using mma::ForwardProblem;
using mma::TileGrid;

constexpr double kLog2E = 1.4426950408889634;

// Calls f.operator()<kHeads>(grid) for the tiles of a group: pairs of heads, then single ones.
template <template <int, int> class Shape, int kDim, class F>
void ForTiles(Context& ctx, int64_t group, F f) {
  const mma::HeadTiles tiles = mma::TilesOfGroup<Shape, kDim>(group, MmaSharedBytes(ctx));
  if constexpr (kDim <= mma::kMaxPairedDim) {
    if (tiles.pairs > 0) f.template operator()<2>(TileGrid{static_cast<unsigned>(tiles.pairs), 0});
  }
  if (tiles.singles > 0) {
    f.template operator()<1>(TileGrid{static_cast<unsigned>(tiles.singles), 2 * tiles.pairs});
  }
}

// Offsets within 64 tokens are 32-bit in the kernels.
int CheckedStride(const char* name, int64_t stride) {
  LONGSPAN_CHECK(stride <= INT32_MAX / kMaskBlock)
      << "mma_bf16: " << name << " has " << stride << " elements between tokens; at most "
      << INT32_MAX / kMaskBlock << " are possible";
  return static_cast<int>(stride);
}

void CheckAligned(const char* name, const Tensor& t) {
  LONGSPAN_CHECK(reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0)
      << "mma_bf16: " << name << " does not start at 16 bytes";
}

void CheckKeys(const KvView& kv) {
  CheckAligned("k", kv.k);
  CheckAligned("v", kv.v);
  LONGSPAN_CHECK(kv.table->alignment() % 8 == 0)
      << "mma_bf16: tokens of k and v start at multiples of " << kv.table->alignment()
      << " elements, not of 8";
}

// {lse in units of log2, delta - dlse} of row t and head h at [h * stride + t].
__global__ void StatisticsKernel(int64_t tokens, int64_t heads, int64_t stride, const float* lse,
                                 const float* delta, const float* dlse, float2* statistics) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= tokens * heads) return;
  const int64_t head = i / tokens, token = i % tokens, row = token * heads + head;
  const float log2 = lse[row] * static_cast<float>(kLog2E);
  const float shift = dlse != nullptr ? dlse[row] : 0.0f;
  // A row that sees nothing gets weights exp2(s - inf) = 0.
  statistics[head * stride + token] =
      make_float2(lse[row] == -INFINITY ? INFINITY : log2, delta[row] - shift);
}

__global__ void RoundKernel(int64_t pieces, const float4* from, uint2* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= pieces) return;
  const float4 value = from[i];
  const auto pack = [](float low, float high) {
    return BF16(low).bits | static_cast<uint32_t>(BF16(high).bits) << 16;
  };
  to[i] = make_uint2(pack(value.x, value.y), pack(value.z, value.w));
}

// BackwardProblem::statistics; nothing of sigmoid.
struct Statistics {
  Tensor rows;
  int64_t stride = 0;
};
Statistics MakeStatistics(Context& ctx, const BackwardArgs& args) {
  if (args.normalization == Normalization::kSigmoid) return {};
  const int64_t tokens = args.q.dim(0), heads = args.q.dim(1);
  const int64_t stride = (tokens + 1) / 2 * 2 + 2;
  const Statistics statistics{ctx.Empty({heads, stride, 2}, DType::kF32), stride};
  cuda::Launch(ctx.cuda(), "AttentionBackward mma_bf16 rows", StatisticsKernel,
               cuda::Cover(tokens * heads), tokens, heads, stride, args.lse.data<float>(),
               args.delta.data<float>(), args.dlse.defined() ? args.dlse.data<float>() : nullptr,
               reinterpret_cast<float2*>(statistics.rows.raw()));
  return statistics;
}

Tensor RoundedToBf16(Context& ctx, const Tensor& t) {
  if (t.dtype() == DType::kBF16) return t;
  CheckAligned("d_out", t);
  const Tensor rounded = ctx.Empty(t.shape(), DType::kBF16);
  const int64_t pieces = t.numel() / 4;  // head sizes are multiples of 8
  cuda::Launch(ctx.cuda(), "AttentionBackward mma_bf16 d_out", RoundKernel, cuda::Cover(pieces),
               pieces, reinterpret_cast<const float4*>(t.raw()),
               reinterpret_cast<uint2*>(rounded.raw()));
  return rounded;
}

}  // namespace

int64_t MmaSharedBytes(const Context& ctx) {
  return static_cast<int64_t>(ctx.cuda().properties().sharedMemPerBlockOptin);
}

void MmaForward(Context& ctx, const ForwardArgs& args) {
  const int64_t heads = args.q.dim(1), dim = args.q.dim(2);
  if (args.q.numel() == 0) return;
  ForwardProblem p{
      .mask = OnDevice(ctx, args.mask),
      .table = {},
      .q = args.q.data<BF16>(),
      .k = nullptr,
      .v = nullptr,
      .heads = heads,
      .group = static_cast<int>(heads / args.mask.kv_heads()),
      .dim = static_cast<int>(dim),
      .q_stride = CheckedStride("q", heads * dim),
      .kv_stride = 0,
      // Above 0, so that it times -inf is -inf.
      .scale_log2 = std::max(static_cast<float>(std::abs(args.scale) * kLog2E), FLT_MIN),
      .bias_log2 = static_cast<float>(args.bias * kLog2E),
      .negate = args.scale < 0,
      .o_bf16 = args.o.dtype() == DType::kBF16,
      .o = args.o.raw(),
      .lse = args.lse.defined() ? args.lse.data<float>() : nullptr};
  CheckAligned("q", args.q);
  if (!args.mask.empty()) {
    CheckKeys(args.kv);
    p.table = OnDevice(ctx, *args.kv.table);
    p.k = args.kv.k.data<BF16>();
    p.v = args.kv.v.data<BF16>();
    p.kv_stride = CheckedStride("k", args.kv.token_stride());
  }
  DispatchNormalization(args.normalization, [&]<Normalization kNormalization>() {
    mma::DispatchDim(dim, [&]<int kDim>() {
      ForTiles<mma::ForwardShape, kDim>(ctx, p.group, [&]<int kHeads>(const TileGrid& grid) {
        mma::LaunchForward<kDim, kHeads, kNormalization>(ctx.cuda(), p, grid);
      });
    });
  });
}

void MmaBackward(Context& ctx, const BackwardArgs& args) {
  const int64_t heads = args.q.dim(1), dim = args.q.dim(2);
  if (args.mask.empty()) return;
  CheckAligned("q", args.q);
  CheckKeys(args.kv);
  const Tensor d_out = RoundedToBf16(ctx, args.d_out);
  CheckAligned("d_out", d_out);
  CheckAligned("dq", args.dq);
  const Statistics statistics = MakeStatistics(ctx, args);
  const BackwardProblem p{.mask = OnDevice(ctx, args.mask),
                          .table = OnDevice(ctx, *args.kv.table),
                          .gradient_table = OnDevice(ctx, *args.dkv.table),
                          .q = args.q.data<BF16>(),
                          .k = args.kv.k.data<BF16>(),
                          .v = args.kv.v.data<BF16>(),
                          .d_out = d_out.data<BF16>(),
                          .statistics = reinterpret_cast<const float2*>(statistics.rows.raw()),
                          .statistics_stride = statistics.stride,
                          .heads = heads,
                          .group = static_cast<int>(heads / args.mask.kv_heads()),
                          .dim = static_cast<int>(dim),
                          .q_stride = CheckedStride("q", heads * dim),
                          .kv_stride = CheckedStride("k", args.kv.token_stride()),
                          .scale = static_cast<float>(args.scale),
                          .scale_log2 = static_cast<float>(args.scale * kLog2E),
                          .bias_log2 = static_cast<float>(args.bias * kLog2E),
                          .dq = args.dq.data<float>(),
                          .dk = args.dkv.dk.data<float>(),
                          .dv = args.dkv.dv.data<float>()};
  // Before anything is added: a refusal would leave half of the gradients there.
  cuda::GridSize(p.mask.columns.busy_tasks);
  cuda::GridSize(p.mask.rows.busy_tasks * p.group);
  DispatchNormalization(args.normalization, [&]<Normalization kNormalization>() {
    mma::DispatchDim(dim, [&]<int kDim>() {
      mma::LaunchKeyGradient<kDim, kNormalization>(ctx.cuda(), p);
      ForTiles<mma::QueryGradientShape, kDim>(ctx, p.group, [&]<int kHeads>(const TileGrid& grid) {
        mma::LaunchQueryGradient<kDim, kHeads, kNormalization>(ctx.cuda(), p, grid);
      });
    });
  });
}

}  // namespace longspan::ops::internal
