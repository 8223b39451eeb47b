#include "ops/elementwise/elementwise_cuda.h"
#include "ops/elementwise/map_cuda.cuh"

namespace longspan::ops::internal {
namespace {

struct Sum {
  template <class Real>
  __device__ Real operator()(Real a, Real b) const {
    return a + b;
  }
};
struct Product {
  float factor;
  __device__ float operator()(float a) const { return a * factor; }
};
struct Between {
  float low, high;
  __device__ float operator()(float a) const { return a < low ? low : a > high ? high : a; }
};
struct Constant {
  float value;
  __device__ float operator()() const { return value; }
};
struct Same {
  __device__ float operator()(float a) const { return a; }
};

constexpr int kColumns = 32, kLanes = 32;  // of a block of AddRowsKernel

// A block owns 32 columns. Lane r adds rows r, r + 32, ..., and a tree the sums of the lanes, so
// that the result does not depend on the grid.
__global__ void __launch_bounds__(kColumns* kLanes)
    AddRowsKernel(int64_t count, int64_t width, const float* rows, float* dst) {
  __shared__ float sums[kLanes][kColumns];
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0;
  if (d < width) {
    for (int64_t p = threadIdx.y; p < count; p += kLanes) sum += rows[p * width + d];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  for (unsigned lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    __syncthreads();
    if (threadIdx.y < lanes)
      sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + lanes][threadIdx.x];
  }
  if (threadIdx.y == 0 && d < width) dst[d] += sums[0][threadIdx.x];
}

template <class F>
void DispatchGpuPair(const char* op, DType a, DType b, F f) {
  DispatchGpuFloat(a, op, [&]<class A>() {
    DispatchGpuFloat(b, op, [&]<class B>() { f.template operator()<A, B>(); });
  });
}

}  // namespace

void AddIntoCuda(Context& ctx, Tensor& dst, const Tensor& src) {
  if (dst.dtype() == DType::kF64) {  // sums over the model and over tokens
    MapCuda(ctx, "AddInto", dst.numel(), dst.data<double>(), Sum(), dst.data<double>(),
            src.data<double>());
    return;
  }
  DispatchGpuPair("AddInto", dst.dtype(), src.dtype(), [&]<class A, class B>() {
    MapCuda(ctx, "AddInto", dst.numel(), dst.data<A>(), Sum(), dst.data<A>(), src.data<B>());
  });
}

Tensor AddCuda(Context& ctx, const Tensor& a, const Tensor& b, Tensor sum) {
  DispatchGpuPair("Add", a.dtype(), b.dtype(), [&]<class A, class B>() {
    MapCuda(ctx, "Add", a.numel(), sum.data<A>(), Sum(), a.data<A>(), b.data<B>());
  });
  return sum;
}

void ScaleCuda(Context& ctx, Tensor& t, double factor) {
  DispatchGpuFloat(t.dtype(), "Scale", [&]<class T>() {
    MapCuda(ctx, "Scale", t.numel(), t.data<T>(), Product{static_cast<float>(factor)}, t.data<T>());
  });
}

void ClampCuda(Context& ctx, Tensor& t, double low, double high) {
  const Between between{static_cast<float>(low), static_cast<float>(high)};
  DispatchGpuFloat(t.dtype(), "Clamp", [&]<class T>() {
    MapCuda(ctx, "Clamp", t.numel(), t.data<T>(), between, t.data<T>());
  });
}

void FillCuda(Context& ctx, Tensor& t, double value) {
  DispatchGpuFloat(t.dtype(), "Fill", [&]<class T>() {
    MapCuda(ctx, "Fill", t.numel(), t.data<T>(), Constant{static_cast<float>(value)});
  });
}

void CastIntoCuda(Context& ctx, const Tensor& src, Tensor& dst) {
  DispatchGpuPair("CastInto", dst.dtype(), src.dtype(), [&]<class To, class From>() {
    MapCuda(ctx, "CastInto", src.numel(), dst.data<To>(), Same(), src.data<From>());
  });
}

void AddRowsIntoCuda(Context& ctx, Tensor& dst, const Tensor& rows) {
  if (dst.dtype() != DType::kF32) {
    throw Unsupported("AddRowsInto: f64 is not built for GPUs; use f32");
  }
  const cuda::LaunchShape shape{dim3(cuda::Cover(dst.numel(), kColumns).grid.x),
                                dim3(kColumns, kLanes)};
  cuda::Launch(ctx.cuda(), "AddRowsInto", AddRowsKernel, shape, rows.dim(0), dst.numel(),
               rows.data<float>(), dst.data<float>());
}

}  // namespace longspan::ops::internal
