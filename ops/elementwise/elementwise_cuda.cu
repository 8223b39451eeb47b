#include "ops/elementwise/elementwise_cuda.h"
#include "ops/elementwise/map_cuda.cuh"

namespace longspan::ops::internal {
namespace {

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Product {
  float factor;
  __device__ float operator()(float a) const { return a * factor; }
};
struct Constant {
  float value;
  __device__ float operator()() const { return value; }
};
struct Same {
  __device__ float operator()(float a) const { return a; }
};

// A thread owns a column and adds its rows in order, so that the sum does not depend on the grid.
__global__ void AddRowsKernel(int64_t count, int64_t width, const float* rows, float* dst) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (d >= width) return;
  float sum = 0;
  for (int64_t p = 0; p < count; ++p) sum += rows[p * width + d];
  dst[d] += sum;
}

template <class F>
void DispatchGpuPair(const char* op, DType a, DType b, F f) {
  DispatchGpuFloat(a, op, [&]<class A>() {
    DispatchGpuFloat(b, op, [&]<class B>() { f.template operator()<A, B>(); });
  });
}

}  // namespace

void AddIntoCuda(Context& ctx, Tensor& dst, const Tensor& src) {
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
  cuda::Launch(ctx.cuda(), "AddRowsInto", AddRowsKernel, cuda::Cover(dst.numel(), 128), rows.dim(0),
               dst.numel(), rows.data<float>(), dst.data<float>());
}

}  // namespace longspan::ops::internal
