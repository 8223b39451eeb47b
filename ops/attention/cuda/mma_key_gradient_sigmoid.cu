// Sigmoid: all head sizes; those in between are padded with zeros.
#include "ops/attention/cuda/mma_key_gradient.cuh"

namespace longspan::ops::mma {

template void LaunchKeyGradient<32, kSigmoid>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<64, kSigmoid>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<96, kSigmoid>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<128, kSigmoid>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<192, kSigmoid>(cuda::Runtime&, const BackwardProblem&);
template void LaunchKeyGradient<256, kSigmoid>(cuda::Runtime&, const BackwardProblem&);

}  // namespace longspan::ops::mma
