#include "ops/activation/swiglu.h"

#include <algorithm>

#include "ops/activation/activation_cuda.h"
#include "ops/activation/formulas.h"
#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
namespace {

void CheckSame(const char* op, const Tensor& a, const Tensor& b) {
  LONGSPAN_CHECK(a.shape() == b.shape() && a.dtype() == b.dtype())
      << op << ": operands " << a.Describe() << " and " << b.Describe();
}

// One pass over both gradients, because the exponential is most of the work.
template <class T>
void Gradients(Context& ctx, int64_t n, const T* dy, const T* gate, const T* up, T* dgate, T* dup) {
  using Acc = Accumulator<T>;
  using internal::kRunElements;
  ParallelRanges(ctx, n, internal::kTaskElements, [&](int64_t begin, int64_t end) {
    alignas(64) Acc wide[3][kRunElements], staged[2][kRunElements];
    for (int64_t i = begin; i < end; i += kRunElements) {
      const int64_t count = std::min(kRunElements, end - i);
      const Acc* d = internal::Widen(dy + i, count, wide[0]);
      const Acc* g = internal::Widen(gate + i, count, wide[1]);
      const Acc* u = internal::Widen(up + i, count, wide[2]);
      Acc* __restrict to_gate = internal::Staging(dgate + i, staged[0]);
      Acc* __restrict to_up = internal::Staging(dup + i, staged[1]);
      for (int64_t j = 0; j < count; ++j) {
        internal::SwiGluSlopes()(to_gate[j], to_up[j], d[j], g[j], u[j]);
      }
      internal::Narrow(to_gate, count, dgate + i);
      internal::Narrow(to_up, count, dup + i);
    }
  });
}

}  // namespace

Tensor SwiGluForward(Context& ctx, const Tensor& gate, const Tensor& up) {
  CheckSame("SwiGluForward", gate, up);
  Tensor y = ctx.Empty(gate.shape(), gate.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::SwiGluForwardCuda(ctx, gate, up, y));
  DispatchFloat(gate.dtype(), "SwiGluForward", [&]<class T>() {
    using Acc = Accumulator<T>;
    internal::Map(
        ctx, gate.numel(), y.data<T>(), [](Acc g, Acc u) { return internal::SwiGluValue()(g, u); },
        gate.data<T>(), up.data<T>());
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
    Gradients<T>(ctx, gate.numel(), dy.data<T>(), gate.data<T>(), up.data<T>(), out.dgate.data<T>(),
                 out.dup.data<T>());
  });
  return out;
}

}  // namespace longspan::ops
