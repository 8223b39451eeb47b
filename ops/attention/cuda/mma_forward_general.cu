// Softmax: head sizes other than 64 and 128, padded with zeros.
#include "ops/attention/cuda/mma_forward.cuh"

namespace longspan::ops::mma {

template void LaunchForward<32, 1, kSoftmax>(cuda::Runtime&, const ForwardProblem&,
                                             const TileGrid&);
template void LaunchForward<32, 2, kSoftmax>(cuda::Runtime&, const ForwardProblem&,
                                             const TileGrid&);
template void LaunchForward<96, 1, kSoftmax>(cuda::Runtime&, const ForwardProblem&,
                                             const TileGrid&);
template void LaunchForward<96, 2, kSoftmax>(cuda::Runtime&, const ForwardProblem&,
                                             const TileGrid&);
template void LaunchForward<192, 1, kSoftmax>(cuda::Runtime&, const ForwardProblem&,
                                              const TileGrid&);
template void LaunchForward<256, 1, kSoftmax>(cuda::Runtime&, const ForwardProblem&,
                                              const TileGrid&);

}  // namespace longspan::ops::mma
