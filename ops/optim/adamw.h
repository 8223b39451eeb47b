#pragma once
#include <cstdint>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// One AdamW step with decoupled weight decay over a flat range of parameters:
//   g = grad_scale * grad
//   m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
//   p = p - lr * ((m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay * p)
// with the old p on the right, when the record of the step says so; else nothing changes. A bucket
// whose parameters decay differently is stepped range by range, through Rows() views.
//
// Shapes    master, grad, m, v, compute_copy: all [n]
// Dtypes    master, grad, m, v all f32 or all f64 (not on a GPU); compute_copy bf16, or undefined
//           (none); record: of StepControl (step_control.h), or undefined: grad_scale 1, applied
// Numerics  in the dtype of master; the bias corrections in f64. compute_copy = master rounded.
//           Elementwise: the same bits however the range is cut or threaded.
// Errors    InvalidArgument naming the argument, before anything is written; lr and weight_decay
//           must be finite, the elements of grad need not be
// Devices   cpu, cuda
struct AdamWOptions {
  double lr = 0;
  double beta1 = 0.9, beta2 = 0.95;  // in [0, 1)
  double eps = 1e-8;                 // > 0 in the dtype of master; outside the square root
  double weight_decay = 0;
  int64_t step = 1;  // counts from 1
};

void AdamWStep(Context& ctx, const AdamWOptions& options, const Tensor& record, Tensor& master,
               const Tensor& grad, Tensor& m, Tensor& v, const Tensor& compute_copy = {});

}  // namespace longspan::ops
