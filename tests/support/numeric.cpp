#include "tests/support/numeric.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/core/rng.h"
#include "tests/support/device.h"

namespace longspan::test {
namespace {

// To the 8 significant bits of bf16, fewer below its smallest normal value 2^-126.
double RoundToBF16(double value) {
  const double v = static_cast<float>(value);
  if (!std::isfinite(v) || v == 0) return v;
  int exponent = 0;  // 2^(exponent - 1) <= |v| < 2^exponent
  std::frexp(v, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent, -125) - 8);
  const double rounded = std::nearbyint(v / unit) * unit;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return std::abs(rounded) < 0x1p128 ? rounded : std::copysign(kInfinity, v);
}

}  // namespace

Vec RoundedTo(DType dtype, Vec values) {
  for (double& v : values) {
    if (dtype == DType::kF32) v = static_cast<float>(v);
    if (dtype == DType::kBF16) v = RoundToBF16(v);
  }
  return values;
}

Vec Normal(int64_t n, uint64_t seed, DType representable) {
  const Philox rng(seed, StreamOf("test normal"));
  Vec v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); ++i) {
    v[i] = rng.Normal(i);
  }
  return RoundedTo(representable, std::move(v));
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
    std::vector<T> out(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      if constexpr (std::is_same_v<T, BF16>) {  // its bits are the upper half of the f32
        const auto value = static_cast<float>(RoundToBF16(values[i]));
        out[i].bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
      } else {
        out[i] = static_cast<T>(values[i]);
      }
    }
    CopyFromHost(ctx, out.data(), t);
  });
  return t;
}

Vec ToVec(const Tensor& tensor) {
  Vec v(static_cast<size_t>(tensor.numel()));
  DispatchFloat(tensor.dtype(), "ToVec", [&]<class T>() {
    std::vector<T> in(v.size());
    CopyToHost(tensor, in.data());
    for (size_t i = 0; i < v.size(); ++i) {
      if constexpr (std::is_same_v<T, BF16>) {
        v[i] = std::bit_cast<float>(uint32_t{in[i].bits} << 16);
      } else {
        v[i] = static_cast<double>(in[i]);
      }
    }
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
