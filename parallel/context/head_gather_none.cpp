#include "parallel/context/head_gather_cuda.h"

namespace longspan::parallel::internal {

void GatherHeadsCuda(Context&, const HeadGather&, const Tensor&, const Tensor&, int64_t) {
  throw Unsupported("GatherHeads: this binary is built without CUDA");
}

}  // namespace longspan::parallel::internal
