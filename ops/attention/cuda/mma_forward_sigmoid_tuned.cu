// Sigmoid: head sizes 64 and 128.
#include "ops/attention/cuda/mma_forward.cuh"

namespace longspan::ops::mma {

template void LaunchForward<64, 1, kSigmoid>(cuda::Runtime&, const ForwardProblem&,
                                             const TileGrid&);
template void LaunchForward<64, 2, kSigmoid>(cuda::Runtime&, const ForwardProblem&,
                                             const TileGrid&);
template void LaunchForward<128, 1, kSigmoid>(cuda::Runtime&, const ForwardProblem&,
                                              const TileGrid&);
template void LaunchForward<128, 2, kSigmoid>(cuda::Runtime&, const ForwardProblem&,
                                              const TileGrid&);

}  // namespace longspan::ops::mma
