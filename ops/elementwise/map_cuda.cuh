#pragma once
#include <cstdint>
#include <type_traits>

#include "ops/core/context.h"
#include "ops/core/cuda/kernel.cuh"
#include "ops/core/cuda/launch.h"
#include "ops/core/cuda/ptx.cuh"
#include "ops/core/dtype.h"

// The CUDA twin of rows.h: elements are widened to the accumulator dtype, computed on, and rounded
// once when stored.
namespace longspan::ops::internal {

// As DispatchFloat, without f64: no training step uses it on a GPU.
template <class F>
decltype(auto) DispatchGpuFloat(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<float>();
    case DType::kBF16:
      return f.template operator()<BF16>();
    case DType::kF64:
      throw Unsupported(Str(op, ": f64 is not built for GPUs; use f32 or bf16"));
    default:
      throw InvalidArgument(Str(op, ": dtype ", ToString(dtype), " is not f32 or bf16"));
  }
}

// N elements that move together, 16 bytes an access where they are that long.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T element[N];
};
template <int N, class T>
__device__ const Pack<T, N>& PackAt(const T* data, int64_t i) {
  LONGSPAN_CHECK_ALIGNED(data + i, (alignof(Pack<T, N>)));
  return *reinterpret_cast<const Pack<T, N>*>(data + i);
}
template <int N, class T>
__device__ Pack<T, N>& PackAt(T* data, int64_t i) {
  LONGSPAN_CHECK_ALIGNED(data + i, (alignof(Pack<T, N>)));
  return *reinterpret_cast<Pack<T, N>*>(data + i);
}

// to[j] = value[j] rounded to T; `to` is aligned as a pack. bf16 by the instruction for a pair of
// them, where the formula of BF16 takes six an element, and as words of 64 bits, because a pack of
// 8 bytes would be stored in pieces. The sign of a NaN is lost.
template <class T, int N, class Acc>
__device__ void StoreRounded(T* to, const Acc (&value)[N]) {
  if constexpr (std::is_same_v<T, BF16> && N % 4 == 0) {
    Pack<uint64_t, N / 4> words;
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const Acc* four = value + 4 * j;
      words.element[j] = uint64_t{cuda::ptx::PackBf16(four[2], four[3])} << 32 |
                         cuda::ptx::PackBf16(four[0], four[1]);
    }
    PackAt<N / 4>(reinterpret_cast<uint64_t*>(to), 0) = words;
  } else {
    Pack<T, N> rounded;
#pragma unroll
    for (int j = 0; j < N; ++j) rounded.element[j] = static_cast<T>(value[j]);
    PackAt<N>(to, 0) = rounded;
  }
}

// Both kernels take packs by value: through references the compiler loads element by element.
template <int N, class Out, class F, class... In>
__global__ void MapKernel(int64_t n, Out* out, F f, const In*... in) {
  using Acc = Accumulator<Out>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (i + N <= n) {
    const auto apply = [&](const Pack<In, N>... from) {
      Acc to[N];
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = f(static_cast<Acc>(from.element[j])...);
      StoreRounded(out + i, to);
    };
    apply(PackAt<N>(in, i)...);
    return;
  }
#pragma unroll 1
  for (int64_t j = i; j < n; ++j) out[j] = static_cast<Out>(f(static_cast<Acc>(in[j])...));
}

template <int N, class Out, class F, class... In>
__global__ void MapPairKernel(int64_t n, Out* out0, Out* out1, F f, const In*... in) {
  using Acc = Accumulator<Out>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (i + N <= n) {
    const auto apply = [&](const Pack<In, N>... from) {
      Acc to0[N], to1[N];
#pragma unroll
      for (int j = 0; j < N; ++j) f(to0[j], to1[j], static_cast<Acc>(from.element[j])...);
      StoreRounded(out0 + i, to0);
      StoreRounded(out1 + i, to1);
    };
    apply(PackAt<N>(in, i)...);
    return;
  }
#pragma unroll 1
  for (int64_t j = i; j < n; ++j) {
    Acc a, b;
    f(a, b, static_cast<Acc>(in[j])...);
    out0[j] = static_cast<Out>(a);
    out1[j] = static_cast<Out>(b);
  }
}

inline bool Aligned16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
constexpr int kPackElements = 8;

// out[i] = f(in_0[i], in_1[i], ...) for i in [0, n); `out` may be one of the inputs itself. f is a
// function object that device code can call. Views that do not start at 16 bytes go one element at
// a time.
template <class Out, class F, class... In>
void MapCuda(Context& ctx, const char* name, int64_t n, Out* out, F f, const In*... in) {
  if (Aligned16(out) && (Aligned16(in) && ...)) {
    cuda::Launch(ctx.cuda(), name, MapKernel<kPackElements, Out, F, In...>,
                 cuda::Cover(n, 256, kPackElements), n, out, f, in...);
  } else {
    cuda::Launch(ctx.cuda(), name, MapKernel<1, Out, F, In...>, cuda::Cover(n), n, out, f, in...);
  }
}

// f(out0[i], out1[i], in_0[i], ...) for i in [0, n), the first two by reference.
template <class Out, class F, class... In>
void MapPairCuda(Context& ctx, const char* name, int64_t n, Out* out0, Out* out1, F f,
                 const In*... in) {
  if (Aligned16(out0) && Aligned16(out1) && (Aligned16(in) && ...)) {
    cuda::Launch(ctx.cuda(), name, MapPairKernel<kPackElements, Out, F, In...>,
                 cuda::Cover(n, 256, kPackElements), n, out0, out1, f, in...);
  } else {
    cuda::Launch(ctx.cuda(), name, MapPairKernel<1, Out, F, In...>, cuda::Cover(n), n, out0, out1,
                 f, in...);
  }
}

}  // namespace longspan::ops::internal
