// Copies and sums of rows of keys and values. One block of threads a strip (at most 64 tokens) and
// plane (K, V), neighbouring threads at neighbouring bytes. Bound by memory.
#include <cstring>

#include "ops/attention/cuda/kv_rows_cuda.h"
#include "ops/core/cuda/launch.h"
#include "ops/elementwise/map_cuda.cuh"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256;
using Strip = RowTable::Strip;

struct DeviceRowTable {
  Tensor storage;
  const Strip* strips;
  const int64_t* from;
};

const DeviceRowTable& OnDevice(Context& ctx, const RowTable& table) {
  return table.device_copies().Get<DeviceRowTable>(ctx, [&] {
    const size_t strips = table.strips().size() * sizeof(Strip);
    const size_t from = table.from().size() * sizeof(int64_t);
    std::vector<std::byte> bytes(strips + from);
    std::memcpy(bytes.data(), table.strips().data(), strips);
    std::memcpy(bytes.data() + strips, table.from().data(), from);
    const Tensor storage = ctx.Empty({static_cast<int64_t>(bytes.size())}, DType::kU8);
    cuda::Upload(ctx.cuda(), storage.raw(), bytes.data(), bytes.size());
    return DeviceRowTable{storage, reinterpret_cast<const Strip*>(storage.raw()),
                          reinterpret_cast<const int64_t*>(storage.raw() + strips)};
  });
}
static_assert(sizeof(Strip) % alignof(int64_t) == 0);

// Where a table leads: strides and sizes in packs, `vector` of them a vector, `width` a token.
struct Steps {
  int64_t from_stride, to_stride;
  int vector, width;
};

template <class P>
struct Places {
  const P *from0, *from1;
  P *to0, *to1;
  // Of the plane of this block of threads. (An array would be kept in local memory.)
  __device__ const P* from() const { return blockIdx.y == 0 ? from0 : from1; }
  __device__ P* to() const { return blockIdx.y == 0 ? to0 : to1; }
};

template <class P>
__global__ void __launch_bounds__(kThreads)
    CopyStripsKernel(const Strip* strips, const int64_t* from, Steps steps, Places<P> places) {
  const Strip strip = strips[blockIdx.x];
  const P* source = places.from() + from[strip.first] * steps.vector;
  P* to = places.to() + strip.to * steps.vector;
  for (int i = static_cast<int>(threadIdx.x); i < strip.tokens * steps.width; i += kThreads) {
    const int token = i / steps.width, at = i % steps.width;
    LONGSPAN_CHECK_ALIGNED(to + token * steps.to_stride + at, sizeof(P));
    to[token * steps.to_stride + at] = source[token * steps.from_stride + at];
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads)
    AddStripsKernel(const Strip* strips, const int64_t* from, Steps steps,
                    Places<Pack<float, N>> places) {
  using P = Pack<float, N>;
  const Strip strip = strips[blockIdx.x];
  const P* sources = places.from();
  P* to = places.to() + strip.to * steps.vector;
  for (int i = static_cast<int>(threadIdx.x); i < strip.tokens * steps.width; i += kThreads) {
    const int token = i / steps.width, at = i % steps.width;
    P& place = to[token * steps.to_stride + at];
    LONGSPAN_CHECK_ALIGNED(&place, sizeof(P));
    P sum = place;
    for (int s = 0; s < strip.sources; ++s) {
      const P add = sources[from[strip.first + s] * steps.vector + token * steps.from_stride + at];
#pragma unroll
      for (int j = 0; j < N; ++j) sum.element[j] += add.element[j];
    }
    place = sum;
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads)
    CopyColumnsKernel(int64_t packs, int64_t width, const P* from, int64_t from_stride, P* to,
                      int64_t to_stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= packs) return;
  const int64_t row = i / width, at = i % width;
  LONGSPAN_CHECK_ALIGNED(to + row * to_stride + at, sizeof(P));
  to[row * to_stride + at] = from[row * from_stride + at];
}

bool AllAligned16(const RowPlanes& planes, int64_t vector_bytes) {
  bool aligned = vector_bytes % 16 == 0;
  for (int i = 0; i < 2; ++i)
    aligned = aligned && Aligned16(planes.from[i]) && Aligned16(planes.to[i]);
  return aligned;
}

cuda::LaunchShape OfStrips(const RowTable& table, const RowPlanes& planes) {
  const unsigned count = planes.to[1] == nullptr ? 1 : 2;
  return {dim3(cuda::GridSize(static_cast<int64_t>(table.strips().size())), count), dim3(kThreads)};
}

template <class P>
Places<P> PlacesOf(const RowPlanes& planes) {
  const auto from = [&](int i) { return reinterpret_cast<const P*>(planes.from[i]); };
  const auto to = [&](int i) { return reinterpret_cast<P*>(planes.to[i]); };
  return {from(0), from(1), to(0), to(1)};
}

Steps StepsOf(const RowTable& table, int64_t vector, int64_t width) {
  return {table.from_stride() * vector, table.to_stride() * vector, static_cast<int>(vector),
          static_cast<int>(vector * width)};
}

template <class P>
void CopyStrips(Context& ctx, const RowTable& table, const RowPlanes& planes, int64_t vector_bytes,
                int64_t width) {
  const DeviceRowTable& device = OnDevice(ctx, table);
  cuda::Launch(ctx.cuda(), "CopyStrips", CopyStripsKernel<P>, OfStrips(table, planes),
               device.strips, device.from,
               StepsOf(table, vector_bytes / static_cast<int64_t>(sizeof(P)), width),
               PlacesOf<P>(planes));
}

template <int N>
void AddStrips(Context& ctx, const RowTable& table, const RowPlanes& planes, int64_t dim,
               int64_t width) {
  const DeviceRowTable& device = OnDevice(ctx, table);
  cuda::Launch(ctx.cuda(), "AddStrips", AddStripsKernel<N>, OfStrips(table, planes), device.strips,
               device.from, StepsOf(table, dim / N, width), PlacesOf<Pack<float, N>>(planes));
}

using Bytes16 = Pack<uint64_t, 2>;

template <class P>
void CopyColumns(Context& ctx, int64_t rows, int64_t width, const std::byte* from,
                 int64_t from_stride, std::byte* to, int64_t to_stride) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(P));
  const int64_t packs = rows * (width / kBytes);
  cuda::Launch(ctx.cuda(), "CopyColumns", CopyColumnsKernel<P>, cuda::Cover(packs, kThreads), packs,
               width / kBytes, reinterpret_cast<const P*>(from), from_stride / kBytes,
               reinterpret_cast<P*>(to), to_stride / kBytes);
}

}  // namespace

void CopyStripsCuda(Context& ctx, const RowTable& table, const RowPlanes& planes,
                    int64_t vector_bytes, int64_t width) {
  if (AllAligned16(planes, vector_bytes)) {
    CopyStrips<Bytes16>(ctx, table, planes, vector_bytes, width);
  } else {
    CopyStrips<uint16_t>(ctx, table, planes, vector_bytes, width);
  }
}

void AddStripsCuda(Context& ctx, const RowTable& table, const RowPlanes& planes, int64_t dim,
                   int64_t width) {
  if (AllAligned16(planes, dim * static_cast<int64_t>(sizeof(float)))) {
    AddStrips<4>(ctx, table, planes, dim, width);
  } else {
    AddStrips<1>(ctx, table, planes, dim, width);
  }
}

void CopyColumnsCuda(Context& ctx, int64_t rows, int64_t width, const std::byte* from,
                     int64_t from_stride, std::byte* to, int64_t to_stride) {
  const bool aligned = Aligned16(from) && Aligned16(to) && width % 16 == 0 &&
                       from_stride % 16 == 0 && to_stride % 16 == 0;
  if (aligned) {
    CopyColumns<Bytes16>(ctx, rows, width, from, from_stride, to, to_stride);
  } else {
    CopyColumns<uint16_t>(ctx, rows, width, from, from_stride, to, to_stride);
  }
}

}  // namespace longspan::ops::internal
