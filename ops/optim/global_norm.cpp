#include "ops/optim/global_norm.h"

#include <vector>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/rows.h"
#include "ops/optim/formulas.h"
#include "ops/optim/optim_cuda.h"

namespace longspan::ops {
namespace {

// sum_of(n, elements) in f64 of fixed runs, and these in order.
template <class SumOf>
void AddSumOf(Context& ctx, const char* op, const Tensor& t, SumOf sum_of, Tensor& out) {
  const int64_t n = t.numel();
  std::vector<double> sums(
      static_cast<size_t>((n + internal::kTaskElements - 1) / internal::kTaskElements));
  DispatchFloat(t.dtype(), op, [&]<class T>() {
    const T* data = t.data<T>();
    ParallelRanges(ctx, n, internal::kTaskElements, [&](int64_t begin, int64_t end) {
      sums[static_cast<size_t>(begin / internal::kTaskElements)] =
          sum_of(end - begin, data + begin);
    });
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  out.data<double>()[0] += total;
}

void CheckTotal(const char* op, const Tensor& total) {
  LONGSPAN_CHECK(total.defined() && total.shape() == Shape({1}) && total.dtype() == DType::kF64)
      << op << ": total is " << total.Describe() << ", not f64[1]";
}

}  // namespace

void AddSumOfSquares(Context& ctx, const Tensor& t, Tensor& total) {
  CheckTotal("AddSumOfSquares", total);
  LONGSPAN_ON_CUDA(ctx, internal::AddSumOfSquaresCuda(ctx, t, total));
  AddSumOf(
      ctx, "AddSumOfSquares", t,
      []<class T>(int64_t n, const T* x) { return internal::Rows<T>().sum_of_squares(n, x); },
      total);
}

void AddNotFinite(Context& ctx, const Tensor& t, Tensor& total) {
  CheckTotal("AddNotFinite", total);
  LONGSPAN_ON_CUDA(ctx, internal::AddNotFiniteCuda(ctx, t, total));
  AddSumOf(
      ctx, "AddNotFinite", t,
      []<class T>(int64_t n, const T* x) {
        return internal::RunSum<double>(
            n, [x](int64_t i) { return internal::NotFinite()(static_cast<double>(x[i])); });
      },
      total);
}

}  // namespace longspan::ops
