#pragma once
#include <string>

#include "ops/core/tensor.h"

namespace longspan::autograd {

// A trained tensor as the ops see it: views into the flat buffers of its bucket. Entries of a tape
// refer to the Parameter, which must outlive them: with sharded weights its tensors are there only
// around their use.
struct Parameter {
  std::string name;      // logical path, also the name in checkpoints
  Tensor value;          // compute dtype
  Tensor grad;           // f32 (f64 in f64 mode); ops ADD to it
  bool trained = false;  // a gradient is wanted although `grad` is undefined until it is added to

  bool WantsGrad() const { return trained || grad.defined(); }
};

}  // namespace longspan::autograd
