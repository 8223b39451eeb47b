#pragma once
#include <string>

#include "ops/core/tensor.h"

namespace longspan::autograd {

// A trained tensor as the ops see it: views into the flat buffers of its bucket.
struct Parameter {
  std::string name;  // logical path, also the name in checkpoints
  Tensor value;      // compute dtype
  Tensor grad;       // f32 (f64 in f64 mode); ops ADD to it. Undefined: none is wanted
};

}  // namespace longspan::autograd
