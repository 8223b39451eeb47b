#include "ops/elementwise/elementwise.h"

#include <algorithm>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/elementwise_cuda.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
namespace {

void CheckOperands(const char* op, const Tensor& a, const Tensor& b) {
  LONGSPAN_CHECK(a.shape() == b.shape())
      << op << ": operands " << a.Describe() << " and " << b.Describe() << " differ in shape";
  LONGSPAN_CHECK(IsFloat(a.dtype()) && AccumulatorOf(a.dtype()) == AccumulatorOf(b.dtype()))
      << op << ": operands " << a.Describe() << " and " << b.Describe()
      << " do not mix (f64 meets only f64)";
}

// f.operator()<A, B>() for two dtypes with the same accumulator, as CheckOperands has made sure.
template <class F>
void DispatchPair(const char* op, DType a, DType b, F f) {
  DispatchFloat(a, op, [&]<class A>() {
    DispatchFloat(b, op, [&]<class B>() {
      if constexpr (std::is_same_v<Accumulator<A>, Accumulator<B>>) f.template operator()<A, B>();
    });
  });
}

// out = a + b; `out` may be `a`.
void Sum(Context& ctx, const char* op, const Tensor& a, const Tensor& b, Tensor& out) {
  DispatchPair(op, a.dtype(), b.dtype(), [&]<class A, class B>() {
    const A* left = a.data<A>();
    const B* right = b.data<B>();
    A* to = out.data<A>();
    const RowKernels<A>& rows = internal::Rows<A>(left == to ? 0 : out.bytes());
    ParallelRanges(ctx, a.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
      if constexpr (std::is_same_v<A, B>) {
        rows.add(end - begin, left + begin, right + begin, to + begin);
      } else {
        rows.add_other(end - begin, left + begin, right + begin, to + begin);
      }
    });
  });
}

template <class To, class From>
To Convert(From value) {
  if constexpr (std::is_same_v<To, BF16>) {
    return BF16(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

}  // namespace

void AddInto(Context& ctx, Tensor& dst, const Tensor& src) {
  CheckOperands("AddInto", dst, src);
  LONGSPAN_ON_CUDA(ctx, internal::AddIntoCuda(ctx, dst, src));
  Sum(ctx, "AddInto", dst, src, dst);
}

Tensor Add(Context& ctx, const Tensor& a, const Tensor& b) {
  CheckOperands("Add", a, b);
  Tensor sum = ctx.Empty(a.shape(), a.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::AddCuda(ctx, a, b, sum));
  Sum(ctx, "Add", a, b, sum);
  return sum;
}

void Scale(Context& ctx, Tensor& t, double factor) {
  LONGSPAN_ON_CUDA(ctx, internal::ScaleCuda(ctx, t, factor));
  DispatchFloat(t.dtype(), "Scale", [&]<class T>() {
    T* data = t.data<T>();
    const auto f = static_cast<Accumulator<T>>(factor);
    ParallelRanges(ctx, t.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) data[i] = T(static_cast<Accumulator<T>>(data[i]) * f);
    });
  });
}

void Clamp(Context& ctx, Tensor& t, double low, double high) {
  LONGSPAN_CHECK(low <= high) << "Clamp: low " << low << " is above high " << high;
  LONGSPAN_ON_CUDA(ctx, internal::ClampCuda(ctx, t, low, high));
  DispatchFloat(t.dtype(), "Clamp", [&]<class T>() {
    using Acc = Accumulator<T>;
    const Acc least = static_cast<Acc>(low), most = static_cast<Acc>(high);
    T* data = t.data<T>();
    ParallelRanges(ctx, t.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Acc x = static_cast<Acc>(data[i]);
        data[i] = T(x < least ? least : x > most ? most : x);
      }
    });
  });
}

void Fill(Context& ctx, Tensor& t, double value) {
  LONGSPAN_ON_CUDA(ctx, internal::FillCuda(ctx, t, value));
  DispatchFloat(t.dtype(), "Fill", [&]<class T>() {
    T* data = t.data<T>();
    const T element = Convert<T>(value);
    ParallelRanges(ctx, t.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
      std::fill(data + begin, data + end, element);
    });
  });
}

void CastInto(Context& ctx, const Tensor& src, Tensor& dst) {
  LONGSPAN_CHECK(src.shape() == dst.shape())
      << "CastInto: " << src.Describe() << " into " << dst.Describe();
  LONGSPAN_ON_CUDA(ctx, internal::CastIntoCuda(ctx, src, dst));
  DispatchFloat(src.dtype(), "CastInto", [&]<class From>() {
    DispatchFloat(dst.dtype(), "CastInto", [&]<class To>() {
      const From* in = src.data<From>();
      To* out = dst.data<To>();
      ParallelRanges(ctx, src.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
        if constexpr (std::is_same_v<From, To>) {
          std::copy(in + begin, in + end, out + begin);
        } else if constexpr (std::is_same_v<Accumulator<From>, Accumulator<To>>) {
          internal::Rows<From>(dst.bytes()).to_other(end - begin, in + begin, out + begin);
        } else {
          for (int64_t i = begin; i < end; ++i) out[i] = Convert<To>(in[i]);
        }
      });
    });
  });
}

Tensor Cast(Context& ctx, const Tensor& t, DType dtype) {
  Tensor out = ctx.Empty(t.shape(), dtype);
  CastInto(ctx, t, out);
  return out;
}

void AddRowsInto(Context& ctx, Tensor& dst, const Tensor& rows) {
  LONGSPAN_CHECK(rows.rank() == 2 && dst.rank() == 1 && rows.dim(1) == dst.dim(0) &&
                 rows.dtype() == dst.dtype() && dst.dtype() != DType::kBF16)
      << "AddRowsInto: rows " << rows.Describe() << " into " << dst.Describe();
  LONGSPAN_ON_CUDA(ctx, internal::AddRowsIntoCuda(ctx, dst, rows));
  const int64_t count = rows.dim(0), width = dst.dim(0);
  DispatchFloat(dst.dtype(), "AddRowsInto", [&]<class T>() {
    if constexpr (!std::is_same_v<T, BF16>) {
      const T* in = rows.data<T>();
      T* out = dst.data<T>();
      ParallelRanges(ctx, width, internal::kRunElements, [&](int64_t begin, int64_t end) {
        alignas(64) T sum[internal::kRunElements] = {};
        for (int64_t p = 0; p < count; ++p) {
          for (int64_t d = begin; d < end; ++d) sum[d - begin] += in[p * width + d];
        }
        for (int64_t d = begin; d < end; ++d) out[d] += sum[d - begin];
      });
    }
  });
}

}  // namespace longspan::ops
