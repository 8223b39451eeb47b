#pragma once
#include "parallel/context/head_gather.h"

namespace longspan::parallel::internal {

// GatherHeads on a GPU, after its checks.
void GatherHeadsCuda(Context& ctx, const HeadGather& gather, const Tensor& in, const Tensor& out,
                     int64_t elements);

}  // namespace longspan::parallel::internal
