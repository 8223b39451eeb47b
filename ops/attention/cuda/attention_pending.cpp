// Stands in for the tensor-core kernels until they are in the tree.
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/core/error.h"

namespace longspan::ops::internal {

void MmaForward(Context&, const ForwardArgs&) { throw Unsupported("mma_bf16 is not built yet"); }
void MmaBackward(Context&, const BackwardArgs&) { throw Unsupported("mma_bf16 is not built yet"); }

}  // namespace longspan::ops::internal
