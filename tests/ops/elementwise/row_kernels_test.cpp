#include "ops/elementwise/cpu/row_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "tests/support/numeric.h"

// Every set of row kernels that this processor can run, against the formulas in f64. The tests of
// the ops run the fastest set only.
namespace longspan::test {
namespace {

using ops::RowKernels;
using ops::RowKernelSet;

constexpr double kPi = 3.14159265358979323846;
constexpr float kGuard = 12345.0f;  // representable in bf16: 12352 is not it, so compare bits

// Below, at and above the widths of vectors and of the runs that sums are made of.
const std::vector<int64_t> kSizes = {1,  2,  3,  4,  5,  7,  8,  9,   15,  16,   17,
                                     31, 32, 33, 47, 63, 64, 65, 100, 129, 1023, 4099};

std::vector<const RowKernelSet*> Sets() {
  const auto& all = ops::internal::AvailableRowKernels();
  return {all.sets, all.sets + all.count};
}

template <class T>
const RowKernels<T>& TableOf(const RowKernelSet& set) {
  if constexpr (std::is_same_v<T, float>) {
    return set.f32;
  } else {
    return set.bf16;
  }
}

// n elements that begin at an odd one, so that no vector is aligned, with guards on both sides.
template <class T>
class Row {
 public:
  explicit Row(int64_t n) : data_(static_cast<size_t>(n) + 34, T(kGuard)) {}
  explicit Row(const Vec& values) : Row(static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) data()[i] = T(static_cast<float>(values[i]));
  }
  T* data() { return data_.data() + 17; }
  Vec values() const {
    Vec v;
    for (size_t i = 17; i + 17 < data_.size(); ++i) v.push_back(static_cast<float>(data_[i]));
    return v;
  }
  bool GuardsHold() const {
    const T guard(kGuard);
    for (size_t i = 0; i < 17; ++i) {
      if (std::memcmp(&data_[i], &guard, sizeof guard) != 0) return false;
      if (std::memcmp(&data_[data_.size() - 1 - i], &guard, sizeof guard) != 0) return false;
    }
    return true;
  }

 private:
  std::vector<T> data_;
};

template <class T>
constexpr DType kTypeOf = std::is_same_v<T, float> ? DType::kF32 : DType::kBF16;

// What one rounding to T makes of the exact values, doubled, and some f32 arithmetic.
template <class T>
double Allowed(const Vec& exact) {
  return 2 * RelRms(RoundedTo(kTypeOf<T>, exact), exact) + 6e-7;
}

template <class T>
void ExpectNear(const Row<T>& got, const Vec& exact, const std::string& what) {
  EXPECT_LE(RelRms(got.values(), exact), Allowed<T>(exact)) << what;
  EXPECT_TRUE(got.GuardsHold()) << what << " writes outside its row";
}

template <class F>
Vec Each(const Vec& a, F f) {
  Vec out;
  for (const double x : a) out.push_back(f(x));
  return out;
}
template <class F>
Vec Each(const Vec& a, const Vec& b, F f) {
  Vec out;
  for (size_t i = 0; i < a.size(); ++i) out.push_back(f(a[i], b[i]));
  return out;
}

double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double Gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / kPi) * (x + 0.044715 * x * x * x)));
}
double SlopeOf(double (*f)(double), double x) { return (f(x + 1e-5) - f(x - 1e-5)) / 2e-5; }
double Silu(double x) { return x * Sigmoid(x); }

template <class T>
void CheckElementwise(const RowKernelSet& set, int64_t n) {
  const RowKernels<T>& k = TableOf<T>(set);
  using Other = typename RowKernels<T>::Other;
  const std::string where = Str(set.name, " ", ToString(kTypeOf<T>), " n ", n, ": ");
  const Vec a = Normal(n, 1, DType::kBF16), b = Normal(n, 2, DType::kBF16),
            c = Normal(n, 3, DType::kBF16);
  Row<T> x(a), y(b), z(c), out(n), out2(n);
  Row<Other> other(b), other_out(n);
  Row<float> sums(c);

  k.add(n, x.data(), y.data(), out.data());
  ExpectNear(out, Each(a, b, [](double p, double q) { return p + q; }), where + "add");
  Row<T> in_place(a);
  k.add(n, in_place.data(), y.data(), in_place.data());
  EXPECT_EQ(in_place.values(), out.values()) << where << "add in place";
  k.add_other(n, x.data(), other.data(), out2.data());
  EXPECT_EQ(out2.values(), out.values()) << where << "add_other";
  k.to_other(n, x.data(), other_out.data());
  EXPECT_EQ(other_out.values(), a) << where << "to_other";  // both dtypes hold these values
  EXPECT_TRUE(other_out.GuardsHold()) << where << "to_other";
  k.accumulate(n, x.data(), sums.data());
  ExpectNear(sums, Each(c, a, [](double p, double q) { return p + q; }), where + "accumulate");
  EXPECT_NEAR(k.sum_of_squares(n, x.data()), Dot(a, a), 1e-13 * Dot(a, a)) << where;

  k.gelu(n, x.data(), out.data());
  ExpectNear(out, Each(a, Gelu), where + "gelu");
  k.gelu_backward(n, y.data(), x.data(), out.data());
  ExpectNear(out, Each(b, a, [](double p, double q) { return p * SlopeOf(Gelu, q); }),
             where + "gelu_backward");
  k.swiglu(n, x.data(), y.data(), out.data());
  ExpectNear(out, Each(a, b, [](double p, double q) { return Silu(p) * q; }), where + "swiglu");
  k.swiglu_backward(n, z.data(), x.data(), y.data(), out.data(), out2.data());
  const Vec silu = Each(a, Silu), slope = Each(a, [](double v) { return SlopeOf(Silu, v); });
  const auto product = [](double p, double q) { return p * q; };
  ExpectNear(out, Each(Each(c, b, product), slope, product), where + "swiglu_backward dgate");
  ExpectNear(out2, Each(c, silu, product), where + "swiglu_backward dup");

  const Vec logits = Each(a, [](double v) { return 3 * v; });
  Row<float> wide(logits);
  double sum = 0;
  for (const double v : logits) sum += std::exp(v);
  EXPECT_NEAR(k.log_sum_exp(n, wide.data()), std::log(sum), 1e-6 * (1 + std::abs(std::log(sum))))
      << where << "log_sum_exp";
  k.softmax_gradient(n, wide.data(), 1.25f, 0.5f, out.data());
  ExpectNear(out, Each(logits, [](double v) { return 0.5 * std::exp(v - 1.25); }),
             where + "softmax_gradient");
}

template <class T>
void CheckRows(const RowKernelSet& set, int64_t width) {
  const RowKernels<T>& k = TableOf<T>(set);
  const std::string where = Str(set.name, " ", ToString(kTypeOf<T>), " width ", width, ": ");
  constexpr int64_t kRows = 3;
  constexpr double kEps = 1e-2;  // large enough that leaving it out shows
  const Vec x = Normal(kRows * width, 1, DType::kBF16), dy = Normal(kRows * width, 2, DType::kBF16);
  const Vec w = Normal(width, 3), dw_before = Normal(width, 4);
  Vec y, dx, dw = dw_before, rstd;
  for (int64_t t = 0; t < kRows; ++t) {
    const auto at = [&](const Vec& v, int64_t d) { return v[static_cast<size_t>(t * width + d)]; };
    double square = 0, dot = 0;
    for (int64_t d = 0; d < width; ++d) square += at(x, d) * at(x, d);
    const double r = 1 / std::sqrt(square / static_cast<double>(width) + kEps);
    rstd.push_back(r);
    for (size_t d = 0; d < w.size(); ++d) {
      dot += at(dy, static_cast<int64_t>(d)) * w[d] * at(x, static_cast<int64_t>(d)) * r;
    }
    for (size_t d = 0; d < w.size(); ++d) {
      const double xhat = at(x, static_cast<int64_t>(d)) * r,
                   slope = at(dy, static_cast<int64_t>(d));
      y.push_back(xhat * w[d]);
      dx.push_back(r * (slope * w[d] - xhat * dot / static_cast<double>(width)));
      dw[d] += slope * xhat;
    }
  }
  Row<T> in(x), slopes(dy), out(kRows * width);
  Row<float> weight(w), got_rstd(kRows), got_dw(dw_before);
  k.rms_norm(kRows, width, in.data(), weight.data(), kEps, out.data(), got_rstd.data());
  ExpectNear(out, y, where + "rms_norm");
  ExpectNear(got_rstd, rstd, where + "rstd");
  k.rms_norm_backward(kRows, width, slopes.data(), in.data(), weight.data(), got_rstd.data(),
                      out.data(), got_dw.data());
  // A row of one or two elements cancels almost to nothing.
  if (width > 4) ExpectNear(out, dx, where + "rms_norm_backward dx");
  ExpectNear(got_dw, dw, where + "rms_norm_backward dw");

  // Rope: kRows tokens of two heads of 2 * width elements.
  const int64_t n = kRows * 2 * 2 * width;
  const Vec heads = Normal(n, 5, DType::kBF16);
  Vec cosines, sines, turned(heads.size());
  for (int64_t i = 0; i < kRows * width; ++i) {
    cosines.push_back(static_cast<float>(std::cos(0.3 * static_cast<double>(i))));
    sines.push_back(static_cast<float>(std::sin(0.3 * static_cast<double>(i))));
  }
  Row<float> c(cosines), s(sines);
  for (const float direction : {1.0f, -1.0f}) {
    for (int64_t t = 0; t < kRows; ++t) {
      for (int64_t h = 0; h < 2; ++h) {
        for (int64_t i = 0; i < width; ++i) {
          const auto low = static_cast<size_t>((t * 2 + h) * 2 * width + i);
          const auto high = low + static_cast<size_t>(width),
                     angle = static_cast<size_t>(t * width + i);
          const double sine = static_cast<double>(direction) * sines[angle];
          turned[low] = heads[low] * cosines[angle] - heads[high] * sine;
          turned[high] = heads[high] * cosines[angle] + heads[low] * sine;
        }
      }
    }
    Row<T> from(heads), to(n);
    k.rope(kRows, 2, width, from.data(), c.data(), s.data(), direction, to.data());
    ExpectNear(to, turned, where + "rope");
  }
}

TEST(RowKernelsTest, EverySetComputesTheFormulas) {
  for (const RowKernelSet* set : Sets()) {
    for (const int64_t n : kSizes) {
      CheckElementwise<float>(*set, n);
      CheckElementwise<BF16>(*set, n);
      if (n > 1024) continue;
      CheckRows<float>(*set, n);
      CheckRows<BF16>(*set, n);
    }
  }
}

TEST(RowKernelsTest, AdamWIsTheRule) {
  const double beta1 = 0.9, beta2 = 0.95, eps = 1e-3, lr = 0.1, decay = 0.2, scale = 0.5;
  const double correct1 = 1.5, correct2 = 3;
  const auto f = [](double v) { return static_cast<float>(v); };
  const ops::internal::AdamWRule<float> rule{f(beta1),     f(1 - beta1), f(beta2),
                                             f(1 - beta2), f(correct1),  f(correct2),
                                             f(eps),       f(lr),        f(decay)};
  for (const RowKernelSet* set : Sets()) {
    for (const int64_t n : kSizes) {
      const Vec g = Normal(n, 1), p = Normal(n, 2), m = Normal(n, 3),
                v = Each(Normal(n, 4), [](double x) { return x * x; });
      Vec new_p, new_m, new_v;
      for (size_t i = 0; i < g.size(); ++i) {
        new_m.push_back(beta1 * m[i] + (1 - beta1) * g[i] * scale);
        new_v.push_back(beta2 * v[i] + (1 - beta2) * g[i] * scale * g[i] * scale);
        new_p.push_back(p[i] - lr * (new_m[i] * correct1 / (std::sqrt(new_v[i] * correct2) + eps) +
                                     decay * p[i]));
      }
      Row<float> gr(g), pr(p), mr(m), vr(v);
      Row<BF16> copy(n);
      set->f32.adamw(n, rule, f(scale), gr.data(), pr.data(), mr.data(), vr.data(), copy.data());
      // Differences of two terms: their rounding can be larger than that of the result.
      for (auto& [got, exact] : {std::pair{&pr, &new_p}, {&mr, &new_m}, {&vr, &new_v}}) {
        EXPECT_LE(RelRms(got->values(), *exact), 2e-6) << set->name << " n " << n;
        EXPECT_TRUE(got->GuardsHold()) << set->name << " n " << n;
      }
      EXPECT_EQ(copy.values(), RoundedTo(DType::kBF16, pr.values())) << set->name;
      EXPECT_TRUE(copy.GuardsHold()) << set->name;
    }
  }
}

// Ties, carries, overflow to infinity, infinities, NaN and values below 2^-126.
TEST(RowKernelsTest, RoundingToBf16IsThatOfTheClass) {
  std::vector<uint32_t> patterns;
  for (uint32_t high = 0; high < 0x10000; high += 7) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      patterns.push_back(high << 16 | low);
    }
  }
  for (const uint32_t special : {0x7f800000u, 0xff800000u, 0x7f800001u, 0xffc00000u, 0x7fffffffu,
                                 0x7f7fffffu, 0x7f7f8000u, 0x80000000u}) {
    patterns.push_back(special);
  }
  const auto n = static_cast<int64_t>(patterns.size());
  std::vector<float> from(patterns.size());
  std::memcpy(from.data(), patterns.data(), 4 * patterns.size());
  for (const RowKernelSet* set : Sets()) {
    std::vector<BF16> to(patterns.size());
    set->f32.to_other(n, from.data(), to.data());
    for (size_t i = 0; i < patterns.size(); ++i) {
      EXPECT_EQ(to[i].bits, BF16(from[i]).bits) << set->name << " " << std::hex << patterns[i];
    }
  }
}

TEST(RowKernelsTest, ExtremeArgumentsOfTheExponential) {
  const Vec x = {-200, -104, -103.875, -88, -87.375, -87.25, 87, 88.25, 89, 200, 1e30};
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const RowKernelSet* set : Sets()) {
    Row<float> in(x), up(Vec(x.size(), 1)), out(static_cast<int64_t>(x.size()));
    const auto n = static_cast<int64_t>(x.size());
    set->f32.swiglu(n, in.data(), up.data(), out.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = x[i] * Sigmoid(x[i]);
      EXPECT_NEAR(out.values()[i], expected, 1e-6 * std::abs(expected) + 1e-35)
          << set->name << " silu(" << x[i] << ")";
    }
    set->f32.softmax_gradient(n, in.data(), 0.0f, 1.0f, out.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = std::min(std::exp(x[i]), 2.4e38);
      EXPECT_NEAR(out.values()[i], expected, (x[i] > 88.3 ? 0.1 : 1e-6) * expected + 2e-38)
          << set->name << " exp(" << x[i] << ")";
    }
    // Anywhere in a row: in the first run of a sum, in its last vector, in a later run.
    for (const int64_t size : {5, 40, 9000}) {
      for (const int64_t place : {int64_t{0}, size / 2, size - 1}) {
        for (const float bad : {kNan, kInfinity, -kInfinity}) {
          std::vector<float> row(static_cast<size_t>(size), 1.0f);
          row[static_cast<size_t>(place)] = bad;
          EXPECT_TRUE(std::isnan(set->f32.log_sum_exp(size, row.data())))
              << set->name << " " << bad << " at " << place << " of " << size;
        }
      }
      std::vector<float> alone(static_cast<size_t>(size), -3e38f);
      alone[static_cast<size_t>(size - 1)] = 3e38f;
      EXPECT_EQ(set->f32.log_sum_exp(size, alone.data()), 3e38f) << set->name;
    }
    std::vector<float> nan(7, kNan), result(7);
    set->f32.gelu(7, nan.data(), result.data());
    for (const float v : result) EXPECT_TRUE(std::isnan(v)) << set->name;
    set->f32.swiglu(7, nan.data(), nan.data(), result.data());
    for (const float v : result) EXPECT_TRUE(std::isnan(v)) << set->name;
  }
}

// Squares that overflow f32 although the values are finite.
TEST(RowKernelsTest, LargeRowsAreNormalised) {
  for (const RowKernelSet* set : Sets()) {
    for (const int64_t width : {3, 16, 33}) {
      Row<float> x(Vec(static_cast<size_t>(width), 1e30)), w(Vec(static_cast<size_t>(width), 1)),
          y(width), rstd(1);
      set->f32.rms_norm(1, width, x.data(), w.data(), 1e-5, y.data(), rstd.data());
      for (const double v : y.values()) EXPECT_NEAR(v, 1, 1e-6) << set->name;
    }
  }
}

TEST(RowKernelsTest, TheProcessorsSetsAreFound) {
  std::string names;
  for (const RowKernelSet* set : Sets()) names += Str(names.empty() ? "" : " ", set->name);
  std::string expected;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) expected += "avx512_bf16 ";
  if (avx512) expected += "avx512 ";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) expected += "avx2 ";
#endif
  EXPECT_EQ(names, expected + "portable");
  EXPECT_EQ(&ops::internal::Rows<float>(), &Sets().front()->f32);
  EXPECT_EQ(&ops::internal::Rows<BF16>(), &Sets().front()->bf16);
  RecordProperty("sets", names);
}

}  // namespace
}  // namespace longspan::test
