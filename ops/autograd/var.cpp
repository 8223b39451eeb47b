#include "ops/autograd/var.h"

#include "ops/elementwise/elementwise.h"

namespace longspan::autograd {

void Var::AddGrad(Context& ctx, const Tensor& grad) const {
  if (!node_->requires_grad) return;
  LONGSPAN_CHECK(grad.shape() == node_->value.shape() && grad.dtype() == node_->value.dtype())
      << "gradient " << grad.Describe() << " of a value " << node_->value.Describe();
  if (!node_->grad.defined()) {
    node_->grad = grad;
  } else if (node_->grad.Unique()) {
    ops::AddInto(ctx, node_->grad, grad);
  } else {
    node_->grad = ops::Add(ctx, node_->grad, grad);
  }
}

}  // namespace longspan::autograd
