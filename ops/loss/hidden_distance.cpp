#include "ops/loss/hidden_distance.h"

#include <vector>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/rows.h"
#include "ops/loss/hidden_distance_cuda.h"
#include "ops/loss/linear_cross_entropy_cuda.h"

namespace longspan::ops {
namespace {

using internal::kNoLabel;
using internal::Narrow;
using internal::Staging;
using internal::Widen;

constexpr int64_t kTokensPerTask = 64;

void CheckOperands(const char* op, const Tensor& x, const Tensor& target, const Tensor& labels) {
  LONGSPAN_CHECK(x.rank() == 2 && x.dim(1) >= 1 && IsFloat(x.dtype()) &&
                 x.shape() == target.shape() && x.dtype() == target.dtype())
      << op << ": x is " << x.Describe() << " and target " << target.Describe()
      << "; both must be float [T, D]";
  LONGSPAN_CHECK(labels.shape() == Shape({x.dim(0)}) && labels.dtype() == DType::kI32)
      << op << ": labels are " << labels.Describe() << " for x " << x.Describe();
}

// Calls body(token, x, target) with the rows widened, for every token that has a label.
template <class T, class Body>
void ForLabelled(Context& ctx, const Tensor& x, const Tensor& target, const Tensor& labels,
                 Body body) {
  using Acc = Accumulator<T>;
  const int64_t width = x.dim(1);
  const int32_t* label = labels.data<int32_t>();
  ParallelRanges(ctx, x.dim(0), kTokensPerTask, [&](int64_t begin, int64_t end) {
    std::vector<Acc> a(static_cast<size_t>(width)), b(static_cast<size_t>(width));
    for (int64_t t = begin; t < end; ++t) {
      if (label[t] == kNoLabel) continue;
      body(t, Widen(x.data<T>() + t * width, width, a.data()),
           Widen(target.data<T>() + t * width, width, b.data()));
    }
  });
}

}  // namespace

Tensor HiddenDistanceForward(Context& ctx, const Tensor& x, const Tensor& target,
                             const Tensor& labels) {
  CheckOperands("HiddenDistanceForward", x, target, labels);
  const Tensor sums = ctx.Zeros({kLossSums}, DType::kF64);
  LONGSPAN_ON_CUDA(ctx, internal::HiddenDistanceForwardCuda(ctx, x, target, labels, sums));
  const int64_t width = x.dim(1);
  std::vector<double> losses(static_cast<size_t>(x.dim(0)));
  DispatchFloat(x.dtype(), "HiddenDistanceForward", [&]<class T>() {
    using Acc = Accumulator<T>;
    ForLabelled<T>(ctx, x, target, labels, [&](int64_t t, const Acc* a, const Acc* b) {
      const Acc square =
          internal::RunSum<Acc>(width, [&](int64_t d) { return (a[d] - b[d]) * (a[d] - b[d]); });
      losses[static_cast<size_t>(t)] = static_cast<double>(square) / static_cast<double>(width);
    });
  });
  double* out = sums.data<double>();
  for (int64_t t = 0; t < x.dim(0); ++t) {
    out[kLossSum] += losses[static_cast<size_t>(t)];
    out[kValidSum] += labels.data<int32_t>()[t] == kNoLabel ? 0 : 1;
  }
  return sums;
}

Tensor HiddenDistanceBackward(Context& ctx, const Tensor& x, const Tensor& target,
                              const Tensor& labels, double scale) {
  CheckOperands("HiddenDistanceBackward", x, target, labels);
  const Tensor dx = ctx.Zeros(x.shape(), x.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::HiddenDistanceBackwardCuda(ctx, x, target, labels, scale, dx));
  const int64_t width = x.dim(1);
  DispatchFloat(x.dtype(), "HiddenDistanceBackward", [&]<class T>() {
    using Acc = Accumulator<T>;
    const Acc factor = static_cast<Acc>(2 * scale / static_cast<double>(width));
    ForLabelled<T>(ctx, x, target, labels, [&](int64_t t, const Acc* a, const Acc* b) {
      std::vector<Acc> staged(std::is_same_v<T, Acc> ? 0 : static_cast<size_t>(width));
      T* row = dx.data<T>() + t * width;
      Acc* __restrict to = Staging(row, staged.data());
      for (int64_t d = 0; d < width; ++d) to[d] = factor * (a[d] - b[d]);
      Narrow(to, width, row);
    });
  });
  return dx;
}

}  // namespace longspan::ops
