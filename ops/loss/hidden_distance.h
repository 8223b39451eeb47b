#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// Distance of hidden states x from those of another run of the model, over the tokens that have a
// label:
//   loss_t = (1 / D) sum_d (x_td - target_td)^2,  summed over t with labels_t != -1.
//
// Shapes    x, target, dx [T, D]; labels [T]; sums f64 [kLossSums] (linear_cross_entropy.h): the
//           loss, 0, and the number of tokens with a label
// Dtypes    x, target, dx all f32, all bf16 or all f64; labels i32
// Numerics  differences and squares in f32 (f64), sums over tokens in f64 in a fixed order. Same
//           bits for any number of threads
// Errors    InvalidArgument naming the op and its operands, before anything is written
// Devices   cpu, cuda (no f64: Unsupported)
Tensor HiddenDistanceForward(Context& ctx, const Tensor& x, const Tensor& target,
                             const Tensor& labels);

// Gradient of scale * loss with respect to x: zero for tokens without a label.
Tensor HiddenDistanceBackward(Context& ctx, const Tensor& x, const Tensor& target,
                              const Tensor& labels, double scale);

}  // namespace longspan::ops
