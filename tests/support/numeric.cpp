#include "tests/support/numeric.h"

#include <cmath>
#include <limits>

#include "ops/core/rng.h"

namespace longspan::test {

Vec Normal(int64_t n, uint64_t seed, DType representable) {
  const Philox rng(seed, StreamOf("test normal"));
  Vec v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); ++i) {
    const float f = static_cast<float>(rng.Normal(i));
    v[i] = representable == DType::kBF16  ? static_cast<double>(BF16(f))
           : representable == DType::kF64 ? rng.Normal(i)
                                          : static_cast<double>(f);
  }
  return v;
}

Vec Uniform(int64_t n, uint64_t seed, double low, double high) {
  const Philox rng(seed, StreamOf("test uniform"));
  Vec v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); ++i) {
    v[i] = static_cast<float>(low + (high - low) * rng.Uniform(i));
  }
  return v;
}

Tensor FromVec(Context& ctx, Shape shape, DType dtype, const Vec& values) {
  Tensor t = ctx.Empty(shape, dtype);
  LONGSPAN_CHECK(t.numel() == static_cast<int64_t>(values.size()));
  DispatchFloat(dtype, "FromVec", [&]<class T>() {
    T* out = t.data<T>();
    for (size_t i = 0; i < values.size(); ++i) {
      if constexpr (std::is_same_v<T, double>) {
        out[i] = values[i];
      } else {
        out[i] = T(static_cast<float>(values[i]));
      }
    }
  });
  return t;
}

Vec ToVec(const Tensor& tensor) {
  Vec v(static_cast<size_t>(tensor.numel()));
  DispatchFloat(tensor.dtype(), "ToVec", [&]<class T>() {
    const T* in = tensor.data<T>();
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<double>(in[i]);
  });
  return v;
}

double RelRms(const Vec& a, const Vec& b) {
  LONGSPAN_CHECK(a.size() == b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = a[i] - b[i];
    difference += d * d;
    norm += b[i] * b[i];
  }
  if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
  return std::sqrt(norm > 0 ? difference / norm : difference);
}

double RelMax(const Vec& a, const Vec& b) {
  LONGSPAN_CHECK(a.size() == b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::abs(a[i] - b[i]);
    if (std::isnan(d)) return std::numeric_limits<double>::infinity();
    difference = std::max(difference, d);
    norm = std::max(norm, std::abs(b[i]));
  }
  return norm > 0 ? difference / norm : difference;
}

Vec NumericGradient(Vec& p, const std::function<double()>& f, double step) {
  Vec g(p.size());
  for (size_t i = 0; i < p.size(); ++i) {
    const double saved = p[i];
    p[i] = saved + step;
    const double up = f();
    p[i] = saved - step;
    const double down = f();
    p[i] = saved;
    g[i] = (up - down) / (2 * step);
  }
  return g;
}

double Dot(const Vec& a, const Vec& b) {
  LONGSPAN_CHECK(a.size() == b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace longspan::test
