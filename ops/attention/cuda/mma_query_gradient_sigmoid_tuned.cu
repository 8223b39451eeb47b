// Sigmoid: head sizes 64 and 128.
#include "ops/attention/cuda/mma_query_gradient.cuh"

namespace longspan::ops::mma {

template void LaunchQueryGradient<64, 1, kSigmoid>(cuda::Runtime&, const BackwardProblem&,
                                                   const TileGrid&);
template void LaunchQueryGradient<64, 2, kSigmoid>(cuda::Runtime&, const BackwardProblem&,
                                                   const TileGrid&);
template void LaunchQueryGradient<128, 1, kSigmoid>(cuda::Runtime&, const BackwardProblem&,
                                                    const TileGrid&);
template void LaunchQueryGradient<128, 2, kSigmoid>(cuda::Runtime&, const BackwardProblem&,
                                                    const TileGrid&);

}  // namespace longspan::ops::mma
