#pragma once
#include <memory>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::autograd {

// A value in the record of a Tape and the slot of its gradient. Copies share both.
class Var {
 public:
  Var() = default;
  explicit Var(Tensor value, bool requires_grad = false)
      : node_(std::make_shared<Node>(Node{std::move(value), {}, requires_grad})) {}

  bool defined() const { return node_ != nullptr; }
  const Tensor& value() const { return node_->value; }
  bool requires_grad() const { return node_->requires_grad; }
  // Undefined until something has flowed back.
  const Tensor& grad() const { return node_->grad; }

  // Adds `grad` (shape and dtype of value()) to the slot. The first contribution is kept as it is;
  // a later one is added in place only when nobody else shares that memory.
  void AddGrad(Context& ctx, const Tensor& grad) const;

 private:
  struct Node {
    Tensor value;
    Tensor grad;
    bool requires_grad;
  };
  std::shared_ptr<Node> node_;
};

}  // namespace longspan::autograd
