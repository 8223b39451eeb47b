#pragma once
#include "ops/attention/attention.h"
#include "ops/attention/kv_view.h"
#include "ops/attention/routed_lists.h"
#include "ops/attention/router.h"
#include "ops/core/tensor.h"

namespace longspan::ops {

// What a choice of blocks needs, checked and allocated, for each implementation of
// routed_attention.h:
//   gate[t, h, b] = q[t, h] . means[b, h / (heads / kv heads)]
// without a scale, over the candidates b of t; the `width` largest are chosen (all of them when
// there are fewer), the lower block among equals. A gate that is NaN counts as +infinity, so that
// whatever is wrong in a block reaches the output.
struct RouteArgs {
  const Tensor& q;      // [T, heads, D]
  const Tensor& means;  // [count, kv heads, D] f32 (f64)
  const RoutedQueries& queries;
  Tensor& selected;  // i32 [heads, T, width]: ascending, then -1
};

// Validated arguments of the attention to chosen blocks. Shapes and dtypes: routed_attention.h.
struct RoutedForwardArgs {
  const Tensor& q;
  const KvView& kv;            // its table is by routed blocks
  const RoutedBlocks& blocks;  // for their lengths
  const RoutedQueries& queries;
  const RoutedLists& lists;
  double scale;
  Tensor& o;  // o and lse: those of other keys; become those of the union
  Tensor& lse;
};
struct RoutedBackwardArgs {
  const Tensor& d_out;
  const Tensor& q;
  const KvView& kv;
  const Tensor& lse;
  const Tensor& delta;
  const RoutedBlocks& blocks;
  const RoutedQueries& queries;
  const RoutedLists& lists;
  double scale;
};

namespace internal {

// Checks that routed_attention.cpp and moba.cpp share. InvalidArgument naming the argument.
void RequireTensor(const Context& ctx, const char* op, const char* name, const Tensor& t,
                   Shape shape, DType dtype, DType other);
// What kernels index the lists by; what is in them is trusted.
void RequireLists(const Context& ctx, const char* op, const RoutedLists& lists, const Tensor& q,
                  const RoutedBlocks& blocks, int64_t width);
// `options` as attention to chosen blocks takes them; the name of the implementation that would
// run. Unsupported when there is none.
const char* RequireRouted(const Context& ctx, const char* op, const Tensor& q, int64_t kv_heads,
                          const AttentionOptions& options);

}  // namespace internal
}  // namespace longspan::ops
