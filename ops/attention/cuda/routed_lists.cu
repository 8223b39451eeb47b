// Lists by counting, prefix sums and filling. A thread owns the counters of one head and chunk of
// rows, so nothing is added atomically and lists come out ascending.
#include <algorithm>

#include "ops/attention/cuda/routed_cuda.h"
#include "ops/core/cuda/backend.h"
#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/launch.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 16;  // counters of one thread in a prefix sum
constexpr int64_t kPiece = kThreads * kEach;
// A chunk has at least as many entries as blocks: counters take no more memory than twice the
// lists.
constexpr int64_t kSmallestChunk = 256;

struct ListProblem {
  const int32_t* selected;  // [heads, rows, width]
  int32_t* query_rows;
  int64_t* offsets;
  int64_t* counters;  // [blocks, heads, chunks]
  int64_t rows, heads, blocks, width, chunk_rows, chunks;
};

// Calls visit(row, counter of its list) for every entry of this thread's chunk.
template <class Visit>
__device__ void ForEachEntry(const ListProblem& p, const Visit& visit) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= p.heads * p.chunks) return;
  const int64_t head = thread / p.chunks, chunk = thread % p.chunks;
  const int64_t end = std::min(p.rows, (chunk + 1) * p.chunk_rows);
  for (int64_t row = chunk * p.chunk_rows; row < end; ++row) {
    const int32_t* chosen = p.selected + (head * p.rows + row) * p.width;
    for (int64_t i = 0; i < p.width && chosen[i] >= 0; ++i) {
      visit(row, p.counters[(chosen[i] * p.heads + head) * p.chunks + chunk]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) CountKernel(ListProblem p) {
  ForEachEntry(p, [](int64_t, int64_t& counter) { ++counter; });
}

__global__ void __launch_bounds__(kThreads) FillKernel(ListProblem p) {
  ForEachEntry(
      p, [&](int64_t row, int64_t& place) { p.query_rows[place++] = static_cast<int32_t>(row); });
}

// Sum of each piece of the counters.
__global__ void __launch_bounds__(kThreads)
    PieceSumKernel(int64_t n, const int64_t* values, int64_t* sums) {
  __shared__ int64_t partial[kThreads];
  const int64_t begin = blockIdx.x * kPiece + threadIdx.x * kEach;
  int64_t sum = 0;
  for (int64_t i = begin; i < std::min(n, begin + kEach); ++i) sum += values[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads; ++i) sum += partial[i];
    sums[blockIdx.x] = sum;
  }
}

// Sums become places of first elements; one thread, a few thousand additions for a row of 1M.
__global__ void PiecePlacesKernel(int64_t pieces, int64_t* sums) {
  int64_t at = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t count = sums[i];
    sums[i] = at;
    at += count;
  }
  sums[pieces] = at;
}

// Counters become places, and the first of each list its offset.
__global__ void __launch_bounds__(kThreads)
    PlacesKernel(int64_t n, const int64_t* piece_places, ListProblem p) {
  __shared__ int64_t partial[kThreads];
  const int64_t begin = blockIdx.x * kPiece + threadIdx.x * kEach, end = std::min(n, begin + kEach);
  int64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += p.counters[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  int64_t at = piece_places[blockIdx.x];
  for (unsigned i = 0; i < threadIdx.x; ++i) at += partial[i];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t count = p.counters[i];
    p.counters[i] = at;
    if (i % p.chunks == 0) p.offsets[i / p.chunks] = at;
    at += count;
  }
  if (begin < n && end == n) p.offsets[n / p.chunks] = at;
}

// A thread per byte of the result: eight blocks of one group of heads.
__global__ void __launch_bounds__(kThreads)
    ListedKernel(const int64_t* offsets, int64_t blocks, int64_t heads, int64_t groups,
                 int64_t bytes, uint8_t* listed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= groups * bytes) return;
  const int64_t group = heads / groups, head = i / bytes * group, first = i % bytes * 8;
  unsigned bits = 0;
  for (int64_t b = first; b < std::min(blocks, first + 8); ++b) {
    const int64_t list = b * heads + head;
    if (offsets[list + group] > offsets[list]) bits |= 1u << (b - first);
  }
  listed[i] = static_cast<uint8_t>(bits);
}

}  // namespace

void ListedBlocksCuda(Context& ctx, const RoutedLists& lists, int64_t groups,
                      const Tensor& listed) {
  cuda::Launch(ctx.cuda(), "ListedBlocks", ListedKernel, cuda::Cover(listed.numel(), kThreads),
               lists.offsets.data<int64_t>(), lists.blocks, lists.heads, groups, listed.dim(1),
               listed.data<uint8_t>());
}

void BuildRoutedListsCuda(Context& ctx, const RoutedLists& lists) {
  const int64_t chunk_rows =
      std::max(kSmallestChunk, (lists.blocks + lists.width - 1) / lists.width);
  const int64_t chunks = (lists.rows + chunk_rows - 1) / chunk_rows;
  const int64_t n = lists.blocks * lists.heads * chunks;
  if (n == 0) return ctx.SetZero(lists.offsets);
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  const Tensor counters = ctx.Zeros({n}, DType::kI64);
  const Tensor sums = ctx.Empty({pieces + 1}, DType::kI64);
  const ListProblem p{.selected = lists.selected.data<int32_t>(),
                      .query_rows = lists.query_rows.data<int32_t>(),
                      .offsets = lists.offsets.data<int64_t>(),
                      .counters = counters.data<int64_t>(),
                      .rows = lists.rows,
                      .heads = lists.heads,
                      .blocks = lists.blocks,
                      .width = lists.width,
                      .chunk_rows = chunk_rows,
                      .chunks = chunks};
  const cuda::LaunchShape by_chunk = cuda::Cover(lists.heads * chunks, kThreads);
  const cuda::LaunchShape by_piece = cuda::Cover(n, kThreads, kEach);
  cuda::Launch(ctx.cuda(), "BuildRoutedLists count", CountKernel, by_chunk, p);
  cuda::Launch(ctx.cuda(), "BuildRoutedLists sums", PieceSumKernel, by_piece, n, p.counters,
               sums.data<int64_t>());
  cuda::Launch(ctx.cuda(), "BuildRoutedLists pieces", PiecePlacesKernel, {dim3(1), dim3(1)}, pieces,
               sums.data<int64_t>());
  cuda::Launch(ctx.cuda(), "BuildRoutedLists places", PlacesKernel, by_piece, n,
               sums.data<int64_t>(), p);
  cuda::Launch(ctx.cuda(), "BuildRoutedLists fill", FillKernel, by_chunk, p);
}

}  // namespace longspan::ops::internal
