#include "ops/attention/arguments.h"
#include "ops/attention/attention.h"
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/merge.h"
#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"

namespace longspan::ops {
namespace {

constexpr int64_t kGrain = 256;  // rows of one task

template <class O, class D, class A>
A RowDot(const O* o, const D* d_out, int64_t n) {
  A sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += static_cast<A>(d_out[d]) * static_cast<A>(o[d]);
  return sum;
}

template <class A>
void MergeRow(A* o, A& lse, const A* o2, A lse2, int64_t dim) {
  const MergeWeights<A> w = WeightsOfParts(lse, lse2);
  for (int64_t d = 0; d < dim; ++d) o[d] = w.empty ? A{0} : w.a * o[d] + w.b * o2[d];
  lse = w.lse;
}

}  // namespace

Tensor AttentionDelta(Context& ctx, const Tensor& d_out, const Tensor& o) {
  const auto is_wide = [](const Tensor& t) { return t.dtype() == DType::kF64; };
  if (!d_out.defined() || !o.defined() || o.rank() != 3 || !(d_out.shape() == o.shape()) ||
      !IsFloat(o.dtype()) || !IsFloat(d_out.dtype()) || is_wide(o) != is_wide(d_out)) {
    throw InvalidArgument(Str("AttentionDelta: d_out ",
                              d_out.defined() ? d_out.Describe() : "undefined", " and o ",
                              o.defined() ? o.Describe() : "undefined",
                              " must be [T, H, D] of one shape, both f64 or both f32 or bf16"));
  }
  internal::RequireDevice(ctx, "AttentionDelta", "d_out", d_out);
  internal::RequireDevice(ctx, "AttentionDelta", "o", o);
  const int64_t rows = o.dim(0) * o.dim(1), dim = o.dim(2);
  Tensor delta = ctx.Empty({o.dim(0), o.dim(1)}, AccumulatorOf(o.dtype()));
  LONGSPAN_ON_CUDA(ctx, internal::AttentionDeltaCuda(ctx, d_out, o, delta));
  DispatchFloat(o.dtype(), "AttentionDelta", [&]<class O>() {
    DispatchFloat(d_out.dtype(), "AttentionDelta", [&]<class D>() {
      using A = Accumulator<O>;
      if constexpr (std::is_same_v<A, Accumulator<D>>) {
        ParallelRanges(ctx, rows, kGrain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            delta.data<A>()[i] =
                RowDot<O, D, A>(o.data<O>() + i * dim, d_out.data<D>() + i * dim, dim);
          }
        });
      }
    });
  });
  return delta;
}

void MergePartial(Context& ctx, Tensor& o, Tensor& lse, const Tensor& o2, const Tensor& lse2) {
  const bool valid = o.defined() && lse.defined() && o2.defined() && lse2.defined() &&
                     o.rank() == 3 && o.shape() == o2.shape() && lse.shape() == lse2.shape() &&
                     lse.shape() == Shape{o.dim(0), o.dim(1)} && o.dtype() == lse.dtype() &&
                     o2.dtype() == o.dtype() && lse2.dtype() == o.dtype() &&
                     (o.dtype() == DType::kF32 || o.dtype() == DType::kF64);
  if (!valid) {
    const auto describe = [](const Tensor& t) {
      return t.defined() ? t.Describe() : std::string("undefined");
    };
    throw InvalidArgument(Str("MergePartial: o ", describe(o), ", lse ", describe(lse), ", o2 ",
                              describe(o2), ", lse2 ", describe(lse2),
                              " must be two pairs of [T, H, D] and [T, H], all f32 or all f64"));
  }
  internal::RequireDevice(ctx, "MergePartial", "o", o);
  internal::RequireDevice(ctx, "MergePartial", "lse", lse);
  internal::RequireDevice(ctx, "MergePartial", "o2", o2);
  internal::RequireDevice(ctx, "MergePartial", "lse2", lse2);
  LONGSPAN_ON_CUDA(ctx, internal::MergePartialCuda(ctx, o, lse, o2, lse2));
  const int64_t rows = lse.numel(), dim = o.dim(2);
  const auto merge = [&]<class A>() {
    ParallelRanges(ctx, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        MergeRow(o.data<A>() + i * dim, lse.data<A>()[i], o2.data<A>() + i * dim, lse2.data<A>()[i],
                 dim);
      }
    });
  };
  if (o.dtype() == DType::kF32) {
    merge.template operator()<float>();
  } else {
    merge.template operator()<double>();
  }
}

}  // namespace longspan::ops
