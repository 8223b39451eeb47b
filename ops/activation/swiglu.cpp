#include "ops/activation/swiglu.h"

#include "ops/activation/activation_cuda.h"
#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
namespace {

void CheckSame(const char* op, const Tensor& a, const Tensor& b) {
  LONGSPAN_CHECK(a.shape() == b.shape() && a.dtype() == b.dtype())
      << op << ": operands " << a.Describe() << " and " << b.Describe();
}

}  // namespace

Tensor SwiGluForward(Context& ctx, const Tensor& gate, const Tensor& up) {
  CheckSame("SwiGluForward", gate, up);
  Tensor y = ctx.Empty(gate.shape(), gate.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::SwiGluForwardCuda(ctx, gate, up, y));
  DispatchFloat(gate.dtype(), "SwiGluForward", [&]<class T>() {
    const T *g = gate.data<T>(), *u = up.data<T>();
    T* out = y.data<T>();
    const RowKernels<T>& rows = internal::Rows<T>(y.bytes());
    ParallelRanges(ctx, gate.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
      rows.swiglu(end - begin, g + begin, u + begin, out + begin);
    });
  });
  return y;
}

SwiGluGradients SwiGluBackward(Context& ctx, const Tensor& dy, const Tensor& gate,
                               const Tensor& up) {
  CheckSame("SwiGluBackward", gate, up);
  CheckSame("SwiGluBackward", gate, dy);
  SwiGluGradients out{ctx.Empty(gate.shape(), gate.dtype()), ctx.Empty(up.shape(), up.dtype())};
  LONGSPAN_ON_CUDA(ctx, internal::SwiGluBackwardCuda(ctx, dy, gate, up, out));
  DispatchFloat(gate.dtype(), "SwiGluBackward", [&]<class T>() {
    const T *slope = dy.data<T>(), *g = gate.data<T>(), *u = up.data<T>();
    T *dgate = out.dgate.data<T>(), *dup = out.dup.data<T>();
    const RowKernels<T>& rows = internal::Rows<T>(out.dgate.bytes() + out.dup.bytes());
    ParallelRanges(ctx, gate.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
      rows.swiglu_backward(end - begin, slope + begin, g + begin, u + begin, dgate + begin,
                           dup + begin);
    });
  });
  return out;
}

}  // namespace longspan::ops
