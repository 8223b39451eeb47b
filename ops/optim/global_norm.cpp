#include "ops/optim/global_norm.h"

#include <vector>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/rows.h"
#include "ops/optim/optim_cuda.h"

namespace longspan::ops {
namespace {

// term(element) in f64, summed over fixed runs and then over the runs in order.
template <class Term>
void AddSumOf(Context& ctx, const char* op, const Tensor& t, Term term, Tensor& out) {
  const int64_t n = t.numel();
  std::vector<double> sums(
      static_cast<size_t>((n + internal::kTaskElements - 1) / internal::kTaskElements));
  DispatchFloat(t.dtype(), op, [&]<class T>() {
    const T* data = t.data<T>();
    ParallelRanges(ctx, n, internal::kTaskElements, [&](int64_t begin, int64_t end) {
      sums[static_cast<size_t>(begin / internal::kTaskElements)] = internal::RunSum<double>(
          end - begin, [&](int64_t i) { return term(static_cast<double>(data[begin + i])); });
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
  AddSumOf(ctx, "AddSumOfSquares", t, internal::Square(), total);
}

void AddNotFinite(Context& ctx, const Tensor& t, Tensor& total) {
  CheckTotal("AddNotFinite", total);
  LONGSPAN_ON_CUDA(ctx, internal::AddNotFiniteCuda(ctx, t, total));
  AddSumOf(ctx, "AddNotFinite", t, internal::NotFinite(), total);
}

}  // namespace longspan::ops
