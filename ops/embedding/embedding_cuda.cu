// Backward: tokens are sorted by id, stably, and cut into chunks of equal length. A chunk adds up
// the runs of equal ids in it. Runs that lie within one chunk go straight to the table; a run over
// several chunks leaves a partial sum in each, which are then added in chunk order. Every sum has
// one order, whatever the grid does.
#include <cub/device/device_radix_sort.cuh>

#include "ops/elementwise/map_cuda.cuh"
#include "ops/embedding/embedding_cuda.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kChunk = 32;  // sorted tokens a chunk

// Sorted ids with the token each came from.
struct Sorted {
  const int32_t* id;
  const int32_t* token;
  int64_t count;

  __device__ bool Valid(int64_t p) const { return p >= 0 && p < count; }
  // Whether positions p and p + 1 exist and hold the same id.
  __device__ bool Joined(int64_t p) const { return Valid(p) && Valid(p + 1) && id[p] == id[p + 1]; }
};

template <class From, class To>
__global__ void ForwardKernel(int64_t elements, int64_t width, int64_t vocab, const int32_t* ids,
                              const From* table, To* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  const int64_t id = ids[i / width];
  const bool known = id >= 0 && id < vocab;
  const float value =
      known ? static_cast<float>(table[id * width + i % width]) : __int_as_float(0x7fffffff);
  y[i] = static_cast<To>(value);
}

__global__ void CountKernel(int64_t n, int32_t* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = static_cast<int32_t>(i);
}

// partial [chunks, 2, width]: of a run that comes from the chunk before, and of one that begins
// here and goes on in the next.
template <class T>
__global__ void ChunkKernel(Sorted sorted, int64_t width, int64_t vocab, const T* dy,
                            float* partial, float* dtable) {
  const int64_t d = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (d >= width) return;
  const int64_t chunk = blockIdx.x, begin = chunk * kChunk;
  const int64_t end = begin + kChunk < sorted.count ? begin + kChunk : sorted.count;
  float sum = 0;
  bool from_before = sorted.Joined(begin - 1);
  for (int64_t p = begin; p < end; ++p) {
    sum += static_cast<float>(dy[static_cast<int64_t>(sorted.token[p]) * width + d]);
    const bool goes_on = sorted.Joined(p);
    if (goes_on && p + 1 < end) continue;
    if (from_before || goes_on) {
      partial[(chunk * 2 + (from_before ? 0 : 1)) * width + d] = sum;
    } else if (sorted.id[p] >= 0 && sorted.id[p] < vocab) {
      dtable[static_cast<int64_t>(sorted.id[p]) * width + d] += sum;
    }
    sum = 0;
    from_before = false;
  }
}

// One block column per chunk; only chunks in which a run over several chunks begins do anything.
__global__ void JoinKernel(Sorted sorted, int64_t width, int64_t vocab, const float* partial,
                           float* dtable) {
  const int64_t d = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (d >= width) return;
  int64_t chunk = blockIdx.x;
  int64_t last = chunk * kChunk + kChunk - 1;
  if (!sorted.Joined(last)) return;
  const int32_t id = sorted.id[last];
  const int64_t before = chunk * kChunk - 1;
  // The whole chunk belongs to a run that began earlier.
  if (sorted.Valid(before) && sorted.id[before] == id) return;
  float sum = partial[(chunk * 2 + 1) * width + d];
  while (sorted.Joined(last)) {
    ++chunk;
    last += kChunk;
    sum += partial[chunk * 2 * width + d];
    if (!sorted.Valid(last) || sorted.id[last] != id) break;
  }
  if (id >= 0 && id < vocab) dtable[static_cast<int64_t>(id) * width + d] += sum;
}

Sorted SortById(Context& ctx, const Tensor& ids, Tensor& keys, Tensor& tokens) {
  const int64_t n = ids.dim(0);
  Tensor order = ctx.Empty({n}, DType::kI32);
  keys = ctx.Empty({n}, DType::kI32);
  tokens = ctx.Empty({n}, DType::kI32);
  cuda::Launch(ctx.cuda(), "EmbeddingBackward", CountKernel, cuda::Cover(n), n,
               order.data<int32_t>());
  const auto sort = [&](void* scratch, size_t& bytes) {
    LONGSPAN_CUDA(cub::DeviceRadixSort::SortPairs(
        scratch, bytes, ids.data<int32_t>(), keys.data<int32_t>(), order.data<int32_t>(),
        tokens.data<int32_t>(), n, 0, 32, ctx.cuda().stream()));
  };
  size_t bytes = 0;
  sort(nullptr, bytes);
  const Tensor scratch = ctx.Empty({static_cast<int64_t>(bytes)}, DType::kU8);
  sort(scratch.raw(), bytes);
  return {keys.data<int32_t>(), tokens.data<int32_t>(), n};
}

}  // namespace

Tensor EmbeddingForwardCuda(Context& ctx, const Tensor& ids, const Tensor& table, Tensor y) {
  DispatchGpuFloat(table.dtype(), "EmbeddingForward", [&]<class From>() {
    DispatchGpuFloat(y.dtype(), "EmbeddingForward", [&]<class To>() {
      cuda::Launch(ctx.cuda(), "EmbeddingForward", ForwardKernel<From, To>, cuda::Cover(y.numel()),
                   y.numel(), table.dim(1), table.dim(0), ids.data<int32_t>(), table.data<From>(),
                   y.data<To>());
    });
  });
  return y;
}

void EmbeddingBackwardCuda(Context& ctx, const Tensor& ids, const Tensor& dy, Tensor& dtable) {
  const int64_t tokens = ids.dim(0), width = dtable.dim(1), vocab = dtable.dim(0);
  if (tokens == 0 || width == 0) return;
  Tensor keys, order;
  const Sorted sorted = SortById(ctx, ids, keys, order);
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  const Tensor partial = ctx.Empty({chunks, 2, width}, DType::kF32);
  const cuda::LaunchShape shape{
      dim3(static_cast<unsigned>(chunks), static_cast<unsigned>((width + kThreads - 1) / kThreads)),
      dim3(kThreads)};
  DispatchGpuFloat(dy.dtype(), "EmbeddingBackward", [&]<class T>() {
    cuda::Launch(ctx.cuda(), "EmbeddingBackward", ChunkKernel<T>, shape, sorted, width, vocab,
                 dy.data<T>(), partial.data<float>(), dtable.data<float>());
  });
  cuda::Launch(ctx.cuda(), "EmbeddingBackward", JoinKernel, shape, sorted, width, vocab,
               partial.data<float>(), dtable.data<float>());
}

}  // namespace longspan::ops::internal
