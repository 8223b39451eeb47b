#include "ops/optim/adamw.h"

#include <cmath>

#include "ops/core/parallel_for.h"
#include "ops/elementwise/rows.h"

namespace longspan::ops {
namespace {

template <class Real>
void Step(Context& ctx, const AdamWOptions& o, Tensor& master, const Tensor& grad, Tensor& m_tensor,
          Tensor& v_tensor, const Tensor& copy) {
  const auto step = static_cast<double>(o.step);
  const auto beta1 = static_cast<Real>(o.beta1), rest1 = static_cast<Real>(1 - o.beta1);
  const auto beta2 = static_cast<Real>(o.beta2), rest2 = static_cast<Real>(1 - o.beta2);
  const auto correct1 = static_cast<Real>(1 / (1 - std::pow(o.beta1, step)));
  const auto correct2 = static_cast<Real>(1 / (1 - std::pow(o.beta2, step)));
  const auto eps = static_cast<Real>(o.eps), lr = static_cast<Real>(o.lr);
  const auto decay = static_cast<Real>(o.weight_decay), scale = static_cast<Real>(o.grad_scale);
  const Real* gradient = grad.data<Real>();
  Real *param = master.data<Real>(), *first = m_tensor.data<Real>(),
       *second = v_tensor.data<Real>();
  BF16* rounded = copy.defined() ? copy.data<BF16>() : nullptr;
  ParallelRanges(ctx, master.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
    const Real* __restrict g_run = gradient + begin;
    Real* __restrict p_run = param + begin;
    Real* __restrict m_run = first + begin;
    Real* __restrict v_run = second + begin;
    for (int64_t i = 0; i < end - begin; ++i) {
      const Real g = g_run[i] * scale;
      const Real m = beta1 * m_run[i] + rest1 * g;
      const Real v = beta2 * v_run[i] + rest2 * (g * g);
      m_run[i] = m;
      v_run[i] = v;
      p_run[i] -= lr * (m * correct1 / (std::sqrt(v * correct2) + eps) + decay * p_run[i]);
    }
    if (rounded != nullptr) {
      for (int64_t i = begin; i < end; ++i) rounded[i] = BF16(static_cast<float>(param[i]));
    }
  });
}

void CheckOperands(const AdamWOptions& o, const Tensor& master, const Tensor& grad, const Tensor& m,
                   const Tensor& v, const Tensor& copy) {
  LONGSPAN_CHECK(master.rank() == 1 && IsFloat(master.dtype()) && master.dtype() != DType::kBF16)
      << "AdamWStep: master is " << master.Describe() << ", not f32[n] or f64[n]";
  for (const Tensor* t : {&grad, &m, &v}) {
    LONGSPAN_CHECK(t->shape() == master.shape() && t->dtype() == master.dtype())
        << "AdamWStep: grad " << grad.Describe() << ", m " << m.Describe() << ", v " << v.Describe()
        << " for master " << master.Describe();
  }
  LONGSPAN_CHECK(!copy.defined() ||
                 (copy.shape() == master.shape() && copy.dtype() == DType::kBF16))
      << "AdamWStep: compute copy " << copy.Describe() << " for master " << master.Describe();
  LONGSPAN_CHECK(o.step >= 1 && o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1)
      << "AdamWStep: step " << o.step << ", beta1 " << o.beta1 << ", beta2 " << o.beta2;
  const auto working = [wide = master.dtype() == DType::kF64](double value) {
    return wide ? value : static_cast<double>(static_cast<float>(value));
  };
  LONGSPAN_CHECK(working(o.eps) > 0 && std::isfinite(working(o.eps)))
      << "AdamWStep: eps " << o.eps << " must be positive and finite in "
      << ToString(master.dtype());
  LONGSPAN_CHECK(std::isfinite(working(o.lr)) && std::isfinite(working(o.grad_scale)) &&
                 std::isfinite(working(o.weight_decay)))
      << "AdamWStep: lr " << o.lr << ", grad_scale " << o.grad_scale << ", weight_decay "
      << o.weight_decay << " must be finite in " << ToString(master.dtype());
}

}  // namespace

void AdamWStep(Context& ctx, const AdamWOptions& options, Tensor& master, const Tensor& grad,
               Tensor& m, Tensor& v, const Tensor& compute_copy) {
  CheckOperands(options, master, grad, m, v, compute_copy);
  if (master.dtype() == DType::kF64) {
    Step<double>(ctx, options, master, grad, m, v, compute_copy);
  } else {
    Step<float>(ctx, options, master, grad, m, v, compute_copy);
  }
}

}  // namespace longspan::ops
