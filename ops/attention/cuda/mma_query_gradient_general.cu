// Softmax: head sizes other than 64 and 128, padded with zeros.
#include "ops/attention/cuda/mma_query_gradient.cuh"

namespace longspan::ops::mma {

template void LaunchQueryGradient<32, 1, kSoftmax>(cuda::Runtime&, const BackwardProblem&,
                                                   const TileGrid&);
template void LaunchQueryGradient<32, 2, kSoftmax>(cuda::Runtime&, const BackwardProblem&,
                                                   const TileGrid&);
template void LaunchQueryGradient<96, 1, kSoftmax>(cuda::Runtime&, const BackwardProblem&,
                                                   const TileGrid&);
template void LaunchQueryGradient<96, 2, kSoftmax>(cuda::Runtime&, const BackwardProblem&,
                                                   const TileGrid&);
template void LaunchQueryGradient<192, 1, kSoftmax>(cuda::Runtime&, const BackwardProblem&,
                                                    const TileGrid&);
template void LaunchQueryGradient<256, 1, kSoftmax>(cuda::Runtime&, const BackwardProblem&,
                                                    const TileGrid&);

}  // namespace longspan::ops::mma
