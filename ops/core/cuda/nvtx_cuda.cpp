#include <nvtx3/nvToolsExt.h>

#include "ops/core/cuda/backend.h"

namespace longspan::cuda {

void PushRange(const char* name) { nvtxRangePushA(name); }
void PopRange() { nvtxRangePop(); }

}  // namespace longspan::cuda
