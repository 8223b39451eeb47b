#include "ops/activation/gelu.h"

#include "ops/activation/activation_cuda.h"
#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
Tensor GeluForward(Context& ctx, const Tensor& x) {
  Tensor y = ctx.Empty(x.shape(), x.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::GeluForwardCuda(ctx, x, y));
  DispatchFloat(x.dtype(), "GeluForward", [&]<class T>() {
    const T* in = x.data<T>();
    T* out = y.data<T>();
    const RowKernels<T>& rows = internal::Rows<T>(y.bytes());
    ParallelRanges(ctx, x.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
      rows.gelu(end - begin, in + begin, out + begin);
    });
  });
  return y;
}

Tensor GeluBackward(Context& ctx, const Tensor& dy, const Tensor& x) {
  LONGSPAN_CHECK(dy.shape() == x.shape() && dy.dtype() == x.dtype())
      << "GeluBackward: dy " << dy.Describe() << " and x " << x.Describe();
  Tensor dx = ctx.Empty(x.shape(), x.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::GeluBackwardCuda(ctx, dy, x, dx));
  DispatchFloat(x.dtype(), "GeluBackward", [&]<class T>() {
    const T *slope = dy.data<T>(), *in = x.data<T>();
    T* out = dx.data<T>();
    const RowKernels<T>& rows = internal::Rows<T>(dx.bytes());
    ParallelRanges(ctx, x.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
      rows.gelu_backward(end - begin, slope + begin, in + begin, out + begin);
    });
  });
  return dx;
}

}  // namespace longspan::ops
