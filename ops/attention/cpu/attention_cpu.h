#pragma once
#include <vector>

#include "ops/attention/attention.h"
#include "ops/attention/cpu/block_kernels.h"

namespace longspan::ops::cpu {

// Validated arguments of one call (attention.cpp); outputs are allocated.
struct ForwardArgs {
  const Tensor& q;
  const KvView& kv;
  const BlockMask& mask;
  double scale;
  Tensor& o;
  Tensor& lse;
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
};

// Row-wise, straight from the formula; f32, bf16 and f64.
void ReferenceForward(Context& ctx, const ForwardArgs& args);
void ReferenceBackward(Context& ctx, const BackwardArgs& args);

// 64 x 64 blocks, online softmax, f32 arithmetic on f32 or bf16 operands.
void BlockedForward(Context& ctx, const BlockKernels& kernels, const ForwardArgs& args);
void BlockedBackward(Context& ctx, const BlockKernels& kernels, const BackwardArgs& args);

// Largest head_dim of the blocked kernels.
inline constexpr int64_t kMaxBlockedHeadDim = 256;

// One independent piece of work: a query (or key) block of one kv head.
struct BlockTask {
  int32_t index;  // row of row_runs() or column_runs()
  int32_t kv_head;
};
// All pieces along one axis, those with most entries first.
std::vector<BlockTask> TasksByCost(const BlockMask& mask, const BlockRuns& runs);

// Local token offset in mask.queries() by global block id, -1 where absent.
std::vector<int64_t> QueryTokenOffsets(const BlockMask& mask);

}  // namespace longspan::ops::cpu
