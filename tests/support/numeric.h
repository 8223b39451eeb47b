#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "ops/core/context.h"
#include "ops/core/tensor.h"

namespace longspan::test {

using Vec = std::vector<double>;

// Standard normal values that every dtype of interest represents: rounded to f32, or to bf16.
Vec Normal(int64_t n, uint64_t seed, DType representable = DType::kF32);
Vec Uniform(int64_t n, uint64_t seed, double low, double high);

// The nearest values of `dtype`, ties to even; bf16 by way of f32, as the ops store it. Written
// without the class BF16, which tests compare with it.
Vec RoundedTo(DType dtype, Vec values);

// Host values to a tensor of any float dtype on the device of `ctx` (rounding once), and back.
Tensor FromVec(Context& ctx, Shape shape, DType dtype, const Vec& values);
Vec ToVec(const Tensor& tensor);

// || a - b || / || b ||  (|| a || when b is zero). NaN anywhere gives +infinity.
double RelRms(const Vec& a, const Vec& b);
// max |a - b| / max |b|  (max |a| when b is zero). NaN anywhere gives +infinity.
double RelMax(const Vec& a, const Vec& b);

// Central differences of a scalar function of `p`, all in f64.
Vec NumericGradient(Vec& p, const std::function<double()>& f, double step = 1e-5);

double Dot(const Vec& a, const Vec& b);

}  // namespace longspan::test
