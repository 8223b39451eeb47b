#pragma once
#include "ops/attention/attention.h"
#include "ops/attention/block_mask.h"
#include "ops/attention/kv_view.h"
#include "ops/core/context.h"

namespace longspan::ops {

// Validated arguments of one call (attention.cpp), as implementations on any device take them;
// outputs are allocated. Shapes and dtypes: attention.h.
struct ForwardArgs {
  const Tensor& q;
  const KvView& kv;
  const BlockMask& mask;
  double scale;
  Tensor& o;
  Tensor& lse;
  Tensor block_maxima{};  // zeroed; undefined: not wanted
  Normalization normalization = Normalization::kSoftmax;
  double bias = 0;  // of sigmoid, which leaves lse undefined
};
struct BackwardArgs {
  const Tensor& d_out;
  const Tensor& q;
  const KvView& kv;
  const Tensor& lse;
  const Tensor& delta;
  const Tensor& dlse;  // may be undefined
  const BlockMask& mask;
  double scale;
  Tensor& dq;
  const KvGradView& dkv;
  Normalization normalization = Normalization::kSoftmax;
  double bias = 0;  // of sigmoid, for which lse, delta and dlse are undefined
};

namespace internal {
// InvalidArgument unless `t` (or nothing) is where the Context is: kernels read pointers as memory
// of its device.
void RequireDevice(const Context& ctx, const char* op, const char* name, const Tensor& t);
}  // namespace internal

}  // namespace longspan::ops
