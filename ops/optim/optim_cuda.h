#pragma once
#include "ops/optim/adamw.h"
#include "ops/optim/adamw_rule.h"
#include "ops/optim/formulas.h"
#include "ops/optim/step_control.h"

// CUDA halves of ops/optim: operands have been checked.
namespace longspan::ops::internal {

void AddSumOfSquaresCuda(Context& ctx, const Tensor& t, Tensor& total);
void AddNotFiniteCuda(Context& ctx, const Tensor& t, Tensor& total);
void StepControlCuda(Context& ctx, const Tensor& sums, const Tensor& squares,
                     const StepControlOptions& options, Tensor& record);
void AdamWStepCuda(Context& ctx, const AdamWRule<float>& rule, const Tensor& record, Tensor& master,
                   const Tensor& grad, Tensor& m, Tensor& v, const Tensor& compute_copy);

}  // namespace longspan::ops::internal
