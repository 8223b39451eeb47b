// The GPU side of the ops in binaries without CUDA. Nothing gets here: such a binary cannot make a
// Context on a GPU.
#include "ops/activation/activation_cuda.h"
#include "ops/core/error.h"
#include "ops/elementwise/elementwise_cuda.h"
#include "ops/embedding/embedding_cuda.h"
#include "ops/norm/rms_norm_cuda.h"
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
void FillCuda(Context&, Tensor&, double) { Refuse(); }
void CastIntoCuda(Context&, const Tensor&, Tensor&) { Refuse(); }
void AddRowsIntoCuda(Context&, Tensor&, const Tensor&) { Refuse(); }

Tensor EmbeddingForwardCuda(Context&, const Tensor&, const Tensor&, Tensor) { Refuse(); }
void EmbeddingBackwardCuda(Context&, const Tensor&, const Tensor&, Tensor&) { Refuse(); }

RmsNormResult RmsNormForwardCuda(Context&, const Tensor&, const Tensor&, double, RmsNormResult) {
  Refuse();
}
Tensor RmsNormBackwardCuda(Context&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           Tensor&) {
  Refuse();
}

Tensor RotateCuda(Context&, const char*, const Tensor&, const RopeTable&, int, Tensor) { Refuse(); }

}  // namespace longspan::ops::internal
