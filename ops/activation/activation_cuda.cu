#include "ops/activation/activation_cuda.h"
#include "ops/activation/formulas.h"
#include "ops/elementwise/map_cuda.cuh"

namespace longspan::ops::internal {

Tensor SwiGluForwardCuda(Context& ctx, const Tensor& gate, const Tensor& up, Tensor y) {
  DispatchGpuFloat(gate.dtype(), "SwiGluForward", [&]<class T>() {
    MapCuda(ctx, "SwiGluForward", gate.numel(), y.data<T>(), SwiGluValue(), gate.data<T>(),
            up.data<T>());
  });
  return y;
}

SwiGluGradients SwiGluBackwardCuda(Context& ctx, const Tensor& dy, const Tensor& gate,
                                   const Tensor& up, SwiGluGradients out) {
  DispatchGpuFloat(gate.dtype(), "SwiGluBackward", [&]<class T>() {
    MapPairCuda(ctx, "SwiGluBackward", gate.numel(), out.dgate.data<T>(), out.dup.data<T>(),
                SwiGluSlopes(), dy.data<T>(), gate.data<T>(), up.data<T>());
  });
  return out;
}

Tensor GeluForwardCuda(Context& ctx, const Tensor& x, Tensor y) {
  DispatchGpuFloat(x.dtype(), "GeluForward", [&]<class T>() {
    MapCuda(ctx, "GeluForward", x.numel(), y.data<T>(), GeluValue(), x.data<T>());
  });
  return y;
}

Tensor GeluBackwardCuda(Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx) {
  DispatchGpuFloat(x.dtype(), "GeluBackward", [&]<class T>() {
    MapCuda(ctx, "GeluBackward", x.numel(), dx.data<T>(), GeluSlope(), dy.data<T>(), x.data<T>());
  });
  return dx;
}

}  // namespace longspan::ops::internal
