// The GPU side of the ops in binaries without CUDA. Nothing gets here: such a binary cannot make a
// Context on a GPU.
#include "ops/activation/activation_cuda.h"
#include "ops/core/error.h"
#include "ops/elementwise/elementwise_cuda.h"
#include "ops/embedding/embedding_cuda.h"
#include "ops/gate/duo_gate_cuda.h"
#include "ops/gemm/gemm_cuda.h"
#include "ops/loss/hidden_distance_cuda.h"
#include "ops/loss/linear_cross_entropy_cuda.h"
#include "ops/norm/rms_norm_cuda.h"
#include "ops/optim/optim_cuda.h"
#include "ops/rope/rope_cuda.h"

namespace longspan::ops::internal {
namespace {

[[noreturn]] void Refuse() { throw Unsupported("this binary was built without CUDA"); }

}  // namespace

Tensor SwiGluForwardCuda(Context&, const Tensor&, const Tensor&, Tensor) { Refuse(); }
SwiGluGradients SwiGluBackwardCuda(Context&, const Tensor&, const Tensor&, const Tensor&,
                                   SwiGluGradients) {
  Refuse();
}
Tensor GeluForwardCuda(Context&, const Tensor&, Tensor) { Refuse(); }
Tensor GeluBackwardCuda(Context&, const Tensor&, const Tensor&, Tensor) { Refuse(); }

void AddIntoCuda(Context&, Tensor&, const Tensor&) { Refuse(); }
Tensor AddCuda(Context&, const Tensor&, const Tensor&, Tensor) { Refuse(); }
void ScaleCuda(Context&, Tensor&, double) { Refuse(); }
void ClampCuda(Context&, Tensor&, double, double) { Refuse(); }
void FillCuda(Context&, Tensor&, double) { Refuse(); }
void CastIntoCuda(Context&, const Tensor&, Tensor&) { Refuse(); }
void AddRowsIntoCuda(Context&, Tensor&, const Tensor&) { Refuse(); }

Tensor EmbeddingForwardCuda(Context&, const Tensor&, const Tensor&, Tensor) { Refuse(); }
void EmbeddingBackwardCuda(Context&, const EmbeddingOrder&, const Tensor&, Tensor&) { Refuse(); }

Tensor DuoGateForwardCuda(Context&, const Tensor&, const Tensor&, const Tensor&, Tensor) {
  Refuse();
}
DuoGateGradients DuoGateBackwardCuda(Context&, const Tensor&, const Tensor&, const Tensor&,
                                     const Tensor&, Tensor&, DuoGateGradients) {
  Refuse();
}
void GatePenaltyForwardCuda(Context&, const Tensor&, const GatePenalty&, Tensor&) { Refuse(); }
void GatePenaltyBackwardCuda(Context&, const Tensor&, const GatePenalty&, Tensor&) { Refuse(); }

Tensor HiddenDistanceForwardCuda(Context&, const Tensor&, const Tensor&, const Tensor&, Tensor) {
  Refuse();
}
Tensor HiddenDistanceBackwardCuda(Context&, const Tensor&, const Tensor&, const Tensor&, double,
                                  Tensor) {
  Refuse();
}

void RunCublasLt(Context&, const GemmCall&) { Refuse(); }

LinearCrossEntropyResult LinearCrossEntropyForwardCuda(Context&, const Tensor&, const Tensor&,
                                                       const Tensor&,
                                                       const LinearCrossEntropyOptions&, Tensor,
                                                       LinearCrossEntropyResult) {
  Refuse();
}
Tensor LinearCrossEntropyBackwardCuda(Context&, const LinearCrossEntropyResult&, const Tensor&,
                                      const Tensor&, const Tensor&,
                                      const LinearCrossEntropyOptions&, double, Tensor&) {
  Refuse();
}

void AddSumOfSquaresCuda(Context&, const Tensor&, Tensor&) { Refuse(); }
void AddNotFiniteCuda(Context&, const Tensor&, Tensor&) { Refuse(); }
void StepControlCuda(Context&, const Tensor&, const Tensor&, const StepControlOptions&, Tensor&) {
  Refuse();
}
void AdamWStepCuda(Context&, const AdamWRule<float>&, const Tensor&, Tensor&, const Tensor&,
                   Tensor&, Tensor&, const Tensor&) {
  Refuse();
}

RmsNormResult RmsNormForwardCuda(Context&, const Tensor&, const Tensor&, double, RmsNormResult) {
  Refuse();
}
Tensor RmsNormBackwardCuda(Context&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           Tensor&) {
  Refuse();
}

Tensor RotateCuda(Context&, const char*, const Tensor&, const RopeTable&, int, Tensor) { Refuse(); }

}  // namespace longspan::ops::internal
