#pragma once
#include "ops/attention/routed_lists.h"
#include "ops/attention/router.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// What a choice of blocks needs, checked and allocated, for each implementation of moba.h:
//   gate[t, h, b] = q[t, h] . means[b, h / (heads / kv heads)]
// without a scale, over the candidates b of t; the `width` largest are chosen (all of them when
// there are fewer), the lower block among equals. A gate that is NaN counts as +infinity, so that
// whatever is wrong in a block reaches the output.
struct RouteArgs {
  const Tensor& q;      // [T, heads, D]
  const Tensor& means;  // [count, kv heads, D] f32 (f64)
  const RoutedBlocks& blocks;
  Tensor& selected;  // i32 [heads, T, width]: ascending, then -1
};

// Validated arguments of the attention to chosen blocks (moba.cpp). Shapes and dtypes: moba.h.
struct RoutedForwardArgs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const RoutedBlocks& blocks;
  const RoutedLists& lists;
  double scale;
  Tensor& o;  // o and lse: those of other keys; become those of the union
  Tensor& lse;
};
struct RoutedBackwardArgs {
  const Tensor& d_out;
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& lse;
  const Tensor& delta;
  const RoutedBlocks& blocks;
  const RoutedLists& lists;
  double scale;
  Tensor& dq;  // added to, as dk and dv
  Tensor& dk;
  Tensor& dv;
};

}  // namespace longspan::ops
