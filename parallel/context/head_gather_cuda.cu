#include "parallel/context/head_gather_cuda.h"

#include <algorithm>

#include "ops/core/cuda/backend.h"
#include "ops/elementwise/map_cuda.cuh"

namespace longspan::parallel::internal {
namespace {

using ops::internal::Pack;
using ops::internal::PackAt;

struct Table {
  const HeadGather::Output* outputs;
  const HeadGather::Source* sources;
};

constexpr int kColumns = 32, kTokens = 8;  // of a block of threads
constexpr int64_t kMaxBlocks = 8192;       // along the tokens

// A column is N elements of one output; its thread walks through tokens.
template <int N, class In, class Out>
__global__ void __launch_bounds__(kColumns* kTokens)
    GatherHeadsKernel(Table table, int64_t tokens, int64_t columns, int64_t elements, const In* in,
                      Out* out) {
  using Acc = Accumulator<Out>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (column >= columns) return;
  const unsigned packs = static_cast<unsigned>(elements / N);
  const HeadGather::Output output = table.outputs[static_cast<unsigned>(column) / packs];
  const int64_t d = static_cast<int64_t>(static_cast<unsigned>(column) % packs) * N;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kTokens;
  for (int64_t t = static_cast<int64_t>(blockIdx.y) * kTokens + threadIdx.y; t < tokens;
       t += step) {
    Out* const to = out + (output.to + t * output.to_stride) * elements + d;
    const auto pack = [&](int32_t s) {
      const HeadGather::Source source = table.sources[output.first_source + s];
      return PackAt<N>(in, (source.from + t * source.from_stride) * elements + d);
    };
    const Pack<In, N> first = pack(0);
    if constexpr (std::is_same_v<In, Out>) {
      if (output.sources == 1) {
        PackAt<N>(to, 0) = first;
        continue;
      }
    }
    Acc sum[N];
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = static_cast<Acc>(first.element[j]);
#pragma unroll 1
    for (int32_t s = 1; s < output.sources; ++s) {
      const Pack<In, N> more = pack(s);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += static_cast<Acc>(more.element[j]);
    }
    ops::internal::StoreRounded(to, sum);
  }
}

struct DeviceTable {
  Tensor storage;
  Table table;
};

DeviceTable Upload(Context& ctx, const HeadGather& gather) {
  const size_t outputs = gather.outputs.size() * sizeof(HeadGather::Output);
  const size_t sources = gather.sources.size() * sizeof(HeadGather::Source);
  static_assert(sizeof(HeadGather::Output) % 8 == 0 && sizeof(HeadGather::Source) % 8 == 0);
  DeviceTable copy;
  copy.storage = ctx.Empty({static_cast<int64_t>(outputs + sources)}, DType::kU8);
  std::byte* const base = copy.storage.raw();
  cuda::Upload(ctx.cuda(), base, gather.outputs.data(), outputs);
  cuda::Upload(ctx.cuda(), base + outputs, gather.sources.data(), sources);
  copy.table = {reinterpret_cast<const HeadGather::Output*>(base),
                reinterpret_cast<const HeadGather::Source*>(base + outputs)};
  return copy;
}

template <int N, class In, class Out>
void Run(Context& ctx, const Table& table, const HeadGather& gather, const Tensor& in,
         const Tensor& out, int64_t elements) {
  const int64_t columns = static_cast<int64_t>(gather.outputs.size()) * (elements / N);
  const int64_t rows = std::min((gather.tokens + kTokens - 1) / kTokens, kMaxBlocks);
  const cuda::LaunchShape shape{
      dim3(cuda::GridSize((columns + kColumns - 1) / kColumns), cuda::GridSize(rows)),
      dim3(kColumns, kTokens)};
  cuda::Launch(ctx.cuda(), "GatherHeads", GatherHeadsKernel<N, In, Out>, shape, table,
               gather.tokens, columns, elements, in.data<In>(), out.data<Out>());
}

template <class In, class Out>
void RunPacked(Context& ctx, const Table& table, const HeadGather& gather, const Tensor& in,
               const Tensor& out, int64_t elements) {
  constexpr int kPack = 16 / sizeof(In);
  const bool packed = elements % kPack == 0 && ops::internal::Aligned16(in.raw()) &&
                      ops::internal::Aligned16(out.raw());
  if (packed) return Run<kPack, In, Out>(ctx, table, gather, in, out, elements);
  Run<1, In, Out>(ctx, table, gather, in, out, elements);
}

}  // namespace

void GatherHeadsCuda(Context& ctx, const HeadGather& gather, const Tensor& in, const Tensor& out,
                     int64_t elements) {
  const bool from_bf16 = in.dtype() == DType::kBF16, to_bf16 = out.dtype() == DType::kBF16;
  if (in.dtype() == DType::kF64 || (from_bf16 && !to_bf16)) {
    throw Unsupported(Str("GatherHeads: ", ToString(in.dtype()), " to ", ToString(out.dtype()),
                          " is not built for GPUs"));
  }
  const Table& table =
      gather.device_copies.Get<DeviceTable>(ctx, [&] { return Upload(ctx, gather); }).table;
  if (from_bf16) return RunPacked<BF16, BF16>(ctx, table, gather, in, out, elements);
  if (to_bf16) return RunPacked<float, BF16>(ctx, table, gather, in, out, elements);
  RunPacked<float, float>(ctx, table, gather, in, out, elements);
}

}  // namespace longspan::parallel::internal
