#include "ops/optim/global_norm.h"

#include <cmath>
#include <vector>

#include "ops/core/parallel_for.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
namespace {

// term(element) in f64, summed over fixed runs and then over the runs in order.
template <class Term>
double SumOf(Context& ctx, const char* op, const Tensor& t, Term term) {
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
  return total;
}

}  // namespace

double SumOfSquares(Context& ctx, const Tensor& t) {
  return SumOf(ctx, "SumOfSquares", t, [](double x) { return x * x; });
}

bool AllFinite(Context& ctx, const Tensor& t) {
  // 0 for a finite element, NaN for any other: no test inside the loop, and nothing can cancel.
  return SumOf(ctx, "AllFinite", t, [](double x) { return x - x; }) == 0;
}

}  // namespace longspan::ops
