#include "ops/optim/adamw.h"

#include <cmath>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/elementwise/rows.h"
#include "ops/optim/adamw_rule.h"
#include "ops/optim/optim_cuda.h"

namespace longspan::ops {
namespace {

template <class Real>
internal::AdamWRule<Real> RuleOf(const AdamWOptions& o) {
  const auto step = static_cast<double>(o.step);
  const auto real = [](double value) { return static_cast<Real>(value); };
  return {real(o.beta1),
          real(1 - o.beta1),
          real(o.beta2),
          real(1 - o.beta2),
          real(1 / (1 - std::pow(o.beta1, step))),
          real(1 / (1 - std::pow(o.beta2, step))),
          real(o.eps),
          real(o.lr),
          real(o.weight_decay)};
}

template <class Real>
void Step(Context& ctx, const AdamWOptions& o, const Tensor& record, Tensor& master,
          const Tensor& grad, Tensor& m_tensor, Tensor& v_tensor, const Tensor& copy) {
  const double* decided = record.defined() ? record.data<double>() : nullptr;
  if (decided != nullptr && decided[kStepApply] == 0) return;
  const auto scale = static_cast<Real>(decided != nullptr ? decided[kStepGradScale] : 1.0);
  const internal::AdamWRule<Real> rule = RuleOf<Real>(o);
  const Real* gradient = grad.data<Real>();
  Real *param = master.data<Real>(), *first = m_tensor.data<Real>(),
       *second = v_tensor.data<Real>();
  BF16* rounded = copy.defined() ? copy.data<BF16>() : nullptr;
  ParallelRanges(ctx, master.numel(), internal::kTaskElements, [&](int64_t begin, int64_t end) {
    internal::Rows<Real>().adamw(end - begin, rule, scale, gradient + begin, param + begin,
                                 first + begin, second + begin,
                                 rounded != nullptr ? rounded + begin : nullptr);
  });
}

void CheckOperands(const AdamWOptions& o, const Tensor& record, const Tensor& master,
                   const Tensor& grad, const Tensor& m, const Tensor& v, const Tensor& copy) {
  LONGSPAN_CHECK(!record.defined() ||
                 (record.shape() == Shape({kStepFields}) && record.dtype() == DType::kF64))
      << "AdamWStep: record is " << record.Describe() << ", not one of StepControl";
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
  LONGSPAN_CHECK(std::isfinite(working(o.lr)) && std::isfinite(working(o.weight_decay)))
      << "AdamWStep: lr " << o.lr << ", weight_decay " << o.weight_decay << " must be finite in "
      << ToString(master.dtype());
}

}  // namespace

void AdamWStep(Context& ctx, const AdamWOptions& options, const Tensor& record, Tensor& master,
               const Tensor& grad, Tensor& m, Tensor& v, const Tensor& compute_copy) {
  CheckOperands(options, record, master, grad, m, v, compute_copy);
  if (master.dtype() == DType::kF64) {
    if (ctx.device().kind == DeviceKind::kCuda) {
      throw Unsupported("AdamWStep: f64 is not built for GPUs; use f32");
    }
    Step<double>(ctx, options, record, master, grad, m, v, compute_copy);
    return;
  }
  LONGSPAN_ON_CUDA(ctx, internal::AdamWStepCuda(ctx, RuleOf<float>(options), record, master, grad,
                                                m, v, compute_copy));
  Step<float>(ctx, options, record, master, grad, m, v, compute_copy);
}

}  // namespace longspan::ops
