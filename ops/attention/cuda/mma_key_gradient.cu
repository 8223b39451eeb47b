// Softmax: all head sizes; those in between are padded with zeros.
#include "ops/attention/cuda/mma_key_gradient.cuh"

namespace longspan::ops::mma {

template void LaunchKeyGradient<32, kSoftmax>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<64, kSoftmax>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<96, kSoftmax>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<128, kSoftmax>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<192, kSoftmax>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<256, kSoftmax>(cuda::Runtime&, const BackwardProblem&);

}  // namespace longspan::ops::mma
