#include "ops/elementwise/cpu/row_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "tests/ops/elementwise/row.h"

// Every set of row kernels that this processor can run, against the formulas in f64. The tests of
// the ops run the fastest set only.
namespace longspan::test {
namespace {

constexpr double kPi = 3.14159265358979323846;

// Below, at and above the widths of vectors and of the runs that sums are made of.
const std::vector<int64_t> kSizes = {1,  2,  3,  4,  5,  7,  8,  9,   15,  16,   17,
                                     31, 32, 33, 47, 63, 64, 65, 100, 129, 1023, 4099};

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
void CheckElementwise(const RowKernelSet& set, bool streaming, int64_t n) {
  const RowKernels<T>& k = TableOf<T>(set, streaming);
  using Other = typename RowKernels<T>::Other;
  const std::string where = Str(NameOf(set, streaming), " ", ToString(kTypeOf<T>), " n ", n, ": ");
  const Vec a = Normal(n, 1, DType::kBF16), b = Normal(n, 2, DType::kBF16),
            c = Normal(n, 3, DType::kBF16);
  Row<T> x(a), y(b), z(c), out(n), out2(n);
  Row<Other> other(b), other_out(n);

  k.add(n, x.data(), y.data(), out.data());
  ExpectNear(out, Each(a, b, [](double p, double q) { return p + q; }), where + "add");
  if (!streaming) {
    Row<T> in_place(a);
    k.add(n, in_place.data(), y.data(), in_place.data());
    EXPECT_EQ(in_place.values(), out.values()) << where << "add in place";
  }
  k.add_other(n, x.data(), other.data(), out2.data());
  EXPECT_EQ(out2.values(), out.values()) << where << "add_other";
  k.to_other(n, x.data(), other_out.data());
  EXPECT_EQ(other_out.values(), a) << where << "to_other";  // both dtypes hold these values
  EXPECT_TRUE(other_out.GuardsHold()) << where << "to_other";
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
void CheckRows(const RowKernelSet& set, bool streaming, int64_t width) {
  const RowKernels<T>& k = TableOf<T>(set, streaming);
  const std::string where =
      Str(NameOf(set, streaming), " ", ToString(kTypeOf<T>), " width ", width, ": ");
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

// Rows of a table that are looked up and added to, of which only some columns are asked for.
template <class T>
void CheckTableRows(const RowKernelSet& set, bool streaming, int64_t width) {
  const RowKernels<T>& k = TableOf<T>(set, streaming);
  using Other = typename RowKernels<T>::Other;
  const std::string where =
      Str(NameOf(set, streaming), " ", ToString(kTypeOf<T>), " width ", width, ": ");
  const std::vector<int32_t> ids = {2, 0, 2, 1}, tokens = {1, 0, 2};  // 3 is left out
  const Vec table = Normal(3 * width, 1, DType::kBF16), before = Normal(3 * width, 2);
  const Vec rows = Normal(4 * width, 3, DType::kBF16);
  Row<T> from(table), out(4 * width), added(rows);
  Row<Other> out_other(4 * width);
  Row<float> sums(before);
  k.gather(4, width, ids.data(), from.data(), out.data());
  k.gather_other(4, width, ids.data(), from.data(), out_other.data());
  const int64_t columns = (width + 1) / 2;
  k.scatter_add(3, tokens.data(), ids.data(), width, columns, added.data(), sums.data());
  Vec expected, expected_sums = before;
  for (const int32_t id : ids) {
    expected.insert(expected.end(), table.begin() + id * width, table.begin() + (id + 1) * width);
  }
  for (const int32_t t : tokens) {
    for (int64_t c = 0; c < columns; ++c) {
      expected_sums[static_cast<size_t>(ids[static_cast<size_t>(t)] * width + c)] +=
          rows[static_cast<size_t>(t * width + c)];
    }
  }
  EXPECT_EQ(out.values(), expected) << where << "gather";
  EXPECT_EQ(out_other.values(), expected) << where << "gather_other";
  ExpectNear(sums, expected_sums, where + "scatter_add");
  EXPECT_TRUE(out.GuardsHold() && out_other.GuardsHold()) << where;
}

TEST(RowKernelsTest, EverySetComputesTheFormulas) {
  for (const RowKernelSet* set : Sets()) {
    for (const bool streaming : {false, true}) {
      for (const int64_t n : kSizes) {
        CheckElementwise<float>(*set, streaming, n);
        CheckElementwise<BF16>(*set, streaming, n);
        if (n > 1024) continue;
        CheckRows<float>(*set, streaming, n);
        CheckRows<BF16>(*set, streaming, n);
        CheckTableRows<float>(*set, streaming, n);
        CheckTableRows<BF16>(*set, streaming, n);
      }
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

TEST(RowKernelsTest, GeluOfLargeNumbersIsThemOrNothing) {
  const Vec x = {-3e38, -1e30, -100, -12, -10, 10, 12, 100, 1e30, 3e38};
  const auto n = static_cast<int64_t>(x.size());
  for (const RowKernelSet* set : Sets()) {
    Row<float> in(x), out(n);
    set->f32.gelu(n, in.data(), out.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = x[i] < 0 ? 0 : in.values()[i];
      EXPECT_NEAR(out.values()[i], expected, 1e-7 * expected + 1e-22) << set->name << " " << x[i];
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

// Every element by itself: a mean over a row would hide a bad place of a table or a polynomial.
TEST(RowKernelsTest, FunctionsAreCloseEverywhere) {
  Vec x;
  for (double v = -87; v < 88; v += 0.00371) x.push_back(static_cast<float>(v));
  Vec near_zero;
  for (double v = -9.9; v < 9.9; v += 0.00137) near_zero.push_back(static_cast<float>(v));
  const auto n = static_cast<int64_t>(x.size()), m = static_cast<int64_t>(near_zero.size());
  for (const RowKernelSet* set : Sets()) {
    Row<float> in(x), out(n), small(near_zero), ones(Vec(near_zero.size(), 1)), value(m), slope(m),
        dup(m);
    const auto worst = [&](const Row<float>& got, const Vec& at, auto exact, auto unit) {
      double most = 0;
      const Vec values = got.values();
      for (size_t i = 0; i < at.size(); ++i) {
        most = std::max(most, std::abs(values[i] - exact(at[i])) / unit(at[i]));
      }
      return most;
    };
    set->f32.softmax_gradient(n, in.data(), 0.0f, 1.0f, out.data());
    const auto exponential = [](double v) { return std::exp(v); };
    EXPECT_LT(worst(out, x, exponential, exponential), 2.4e-7) << set->name;

    set->f32.swiglu(m, small.data(), ones.data(), value.data());
    const auto silu_size = [](double v) { return std::abs(Silu(v)) + 1e-30; };
    EXPECT_LT(worst(value, near_zero, Silu, silu_size), 5e-7) << set->name;
    set->f32.swiglu_backward(m, ones.data(), small.data(), ones.data(), slope.data(), dup.data());
    const auto silu_slope = [](double v) {
      const double s = Sigmoid(v);
      return s * (1 + v * (1 - s));
    };
    EXPECT_LT(worst(slope, near_zero, silu_slope, [](double) { return 1.0; }), 1e-6) << set->name;

    // The argument of the sigmoid, 2 u, is rounded before it is an exponent.
    const auto twice_u = [](double v) {
      return 2 * std::sqrt(2 / kPi) * (v + 0.044715 * v * v * v);
    };
    const auto gelu = [&](double v) { return v * Sigmoid(twice_u(v)); };
    set->f32.gelu(m, small.data(), value.data());
    EXPECT_LT(
        worst(value, near_zero, gelu,
              [&](double v) { return (1 + std::abs(twice_u(v))) * (std::abs(gelu(v)) + 1e-36); }),
        4e-7)
        << set->name;
    set->f32.gelu_backward(m, ones.data(), small.data(), slope.data());
    const auto gelu_slope = [&](double v) {
      const double s = Sigmoid(twice_u(v));
      return s + v * s * (1 - s) * 2 * std::sqrt(2 / kPi) * (1 + 3 * 0.044715 * v * v);
    };
    EXPECT_LT(worst(slope, near_zero, gelu_slope, [](double) { return 1.0; }), 3e-6) << set->name;
  }
}

// The reference point of the sum is the first run's, until a later one leaves the range.
TEST(RowKernelsTest, LogSumExpOfRunsOfAnyHeight) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr size_t kRow = 3 * 4096 + 7;
  for (const RowKernelSet* set : Sets()) {
    for (const std::array<double, 4>& heights : {std::array<double, 4>{0, 0, 0, 0},
                                                 {0, 60, 69, 70},
                                                 {0, 80, 0, 0},
                                                 {0, 87, 87, 87},
                                                 {0, 89, 200, -50},
                                                 {0, 1e6, -1e6, 1e6},
                                                 {500, 0, -500, 499},
                                                 {-1e30, 1, 2, 3},
                                                 {-700, -600, -500, -400},
                                                 {-60, -60, -60, -60},
                                                 {-35, -60, -35, -60},
                                                 {0, 0, 0, 3e4}}) {
      const Vec noise = Normal(static_cast<int64_t>(kRow), 1);
      std::vector<float> row(kRow);
      double top = -1e300, sum = 0;
      for (size_t i = 0; i < kRow; ++i) {
        row[i] = static_cast<float>(heights[i / 4096] + noise[i]);
        top = std::max(top, static_cast<double>(row[i]));
      }
      // One element that outweighs all others of low rows: the result is that element.
      if (heights[1] == -60) top = row[4096 + 17] = 0.1f;
      for (const float v : row) sum += std::exp(static_cast<double>(v) - top);
      const double exact = top + std::log(sum);
      const auto n = static_cast<int64_t>(kRow);
      EXPECT_NEAR(set->f32.log_sum_exp(n, row.data()), exact,
                  heights[1] == -60 ? 4e-7 : 2e-7 * (1 + std::abs(exact)))
          << set->name << " " << heights[0] << " " << heights[1] << " " << heights[2];
      for (const size_t place : {size_t{5}, size_t{5000}, kRow - 1}) {
        for (const float bad : {kNan, kInfinity, -kInfinity}) {
          std::vector<float> broken = row;
          broken[place] = bad;
          EXPECT_TRUE(std::isnan(set->f32.log_sum_exp(n, broken.data())))
              << set->name << " " << bad << " at " << place;
        }
      }
    }
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
