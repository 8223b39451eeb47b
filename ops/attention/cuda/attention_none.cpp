// Binaries without CUDA: no Context on a GPU exists, so nothing gets here.
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/attention/cuda/kv_rows_cuda.h"
#include "ops/attention/cuda/routed_cuda.h"
#include "ops/core/error.h"

namespace longspan::ops::internal {
namespace {

[[noreturn]] void Refuse() {
  throw Unsupported("device CUDA is not built into this binary; use device: CPU");
}

}  // namespace

void ReferenceCudaForward(Context&, const ForwardArgs&) { Refuse(); }
void ReferenceCudaBackward(Context&, const BackwardArgs&) { Refuse(); }
void MmaForward(Context&, const ForwardArgs&) { Refuse(); }
void MmaBackward(Context&, const BackwardArgs&) { Refuse(); }
int64_t MmaSharedBytes(const Context&) { Refuse(); }
Tensor AttentionDeltaCuda(Context&, const Tensor&, const Tensor&, Tensor) { Refuse(); }
void MergePartialCuda(Context&, Tensor&, Tensor&, const Tensor&, const Tensor&) { Refuse(); }
void CopyStripsCuda(Context&, const RowTable&, const RowPlanes&, int64_t, int64_t) { Refuse(); }
void AddStripsCuda(Context&, const RowTable&, const RowPlanes&, int64_t, int64_t) { Refuse(); }
void CopyColumnsCuda(Context&, int64_t, int64_t, const std::byte*, int64_t, std::byte*, int64_t) {
  Refuse();
}
void BlockMeansCuda(Context&, const Tensor&, const RoutedBlocks&, const RoutedShare&,
                    const Tensor&) {
  Refuse();
}
void RouteCuda(Context&, const RouteArgs&) { Refuse(); }
void BuildRoutedListsCuda(Context&, const RoutedLists&) { Refuse(); }
void ListedBlocksCuda(Context&, const RoutedLists&, int64_t, const Tensor&) { Refuse(); }
void RoutedForwardCuda(Context&, const RoutedForwardArgs&) { Refuse(); }
void RoutedQueryGradientCuda(Context&, const RoutedBackwardArgs&, Tensor&) { Refuse(); }
void RoutedKeyGradientCuda(Context&, const RoutedBackwardArgs&, const KvGradView&) { Refuse(); }

}  // namespace longspan::ops::internal
