#include "ops/optim/step_control.h"

#include <array>

#include "ops/core/dispatch.h"
#include "ops/optim/formulas.h"
#include "ops/optim/optim_cuda.h"

namespace longspan::ops {

Tensor MakeStepRecord(Context& ctx, double skips) {
  std::array<double, kStepFields> values{};
  values[kStepSkips] = skips;
  Tensor record = ctx.Empty({kStepFields}, DType::kF64);
  record.WriteFrom(values.data());
  return record;
}

void StepControl(Context& ctx, const Tensor& sums, const Tensor& squares,
                 const StepControlOptions& options, Tensor& record) {
  LONGSPAN_CHECK(sums.rank() == 1 && sums.dim(0) >= 3 && sums.dtype() == DType::kF64)
      << "StepControl: sums are " << sums.Describe() << ", not f64[3]";
  LONGSPAN_CHECK(squares.shape() == Shape({1}) && squares.dtype() == DType::kF64)
      << "StepControl: squares are " << squares.Describe() << ", not f64[1]";
  LONGSPAN_CHECK(record.shape() == Shape({kStepFields}) && record.dtype() == DType::kF64)
      << "StepControl: record is " << record.Describe() << ", not f64[" << kStepFields << "]";
  LONGSPAN_CHECK(options.clip_norm >= 0 && options.skips_allowed >= 0)
      << "StepControl: clip_norm " << options.clip_norm << ", skips_allowed "
      << options.skips_allowed;
  LONGSPAN_ON_CUDA(ctx, internal::StepControlCuda(ctx, sums, squares, options, record));
  internal::DecideStep(sums.data<double>(), squares.data<double>()[0], options.clip_norm,
                       options.skips_allowed, record.data<double>());
}

}  // namespace longspan::ops
