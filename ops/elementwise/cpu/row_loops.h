#pragma once
#include "ops/activation/formulas.h"
#include "ops/elementwise/cpu/lanes.h"
#include "ops/elementwise/cpu/row_kernels.h"

// The text of RowKernels. Each row_kernels_*.cpp compiles it for one instruction set, in a
// namespace of that name and with internal linkage, so that no function of one set can end up in
// code of another. The formulas that it shares with other code are always inlined.
namespace longspan::ops::LONGSPAN_ROW_SET {
namespace {

constexpr int64_t kSums = 32;   // interleaved partial sums: the same for every width
constexpr int64_t kRun = 4096;  // elements that are summed in their own dtype

template <class T>
using Wide = Accumulator<T>;
template <class T>
using Vector = typename LanesOf<T>::Type;

inline float SquareRoot(float x) { return __builtin_sqrtf(x); }
inline double SquareRoot(double x) { return __builtin_sqrt(x); }

// How a step of a loop reaches its elements: kCount of them, or the few that are left at the end.
struct Whole {
  int64_t i;
  template <class T>
  auto Get(const T* p) const {
    return Load(p + i);
  }
  template <class T, class V>
  void Put(T* p, V x) const {
    StoreNormal(p + i, x);
  }
  template <class T, class V>
  void PutExact(T* p, V x) const {
    Store(p + i, x);
  }
};
struct Rest {
  int64_t i, count;
  template <class T>
  auto Get(const T* p) const {
    T padded[kWidth] = {};
    for (int64_t l = 0; l < count; ++l) padded[l] = p[i + l];
    return Load(padded);
  }
  template <class T, class V>
  void Put(T* p, V x) const {
    T padded[kWidth];
    StoreNormal(padded, x);
    for (int64_t l = 0; l < count; ++l) p[i + l] = padded[l];
  }
  template <class T, class V>
  void PutExact(T* p, V x) const {
    T padded[kWidth];
    Store(padded, x);
    for (int64_t l = 0; l < count; ++l) p[i + l] = padded[l];
  }
};

// step(at) for all of [0, n).
template <class T, class Step>
inline void Each(int64_t n, Step step) {
  constexpr int64_t kCount = LanesOf<T>::kCount;
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) step(Whole{i});
  if (i < n) step(Rest{i, n - i});
}

// Sum over [0, n) of what term(at) gives, in an order fixed by n: interleaved sums, then a tree.
template <class T, class Term>
inline Wide<T> SumOf(int64_t n, Term term) {
  constexpr int64_t kCount = LanesOf<T>::kCount, kVectors = kSums / kCount;
  Vector<T> sum[kVectors] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t k = 0; k < kVectors; ++k) sum[k] = sum[k] + term(Whole{i + k * kCount});
  }
  for (int64_t k = 0; i < n; ++k, i += kCount) {
    const Vector<T> last = i + kCount <= n ? term(Whole{i}) : term(Rest{i, n - i});
    sum[k] = sum[k] + last;
  }
  Wide<T> lane[kSums];
  for (int64_t k = 0; k < kVectors; ++k) Store(lane + k * kCount, sum[k]);
  for (int64_t width = kSums / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

template <class A, class B>
void Add(int64_t n, const A* a, const B* b, A* out) {
  Each<A>(n, [=](auto at) { at.PutExact(out, at.Get(a) + at.Get(b)); });
}

template <class From, class To>
void Convert(int64_t n, const From* from, To* to) {
  Each<From>(n, [=](auto at) { at.PutExact(to, at.Get(from)); });
}

template <class T>
void Accumulate(int64_t n, const T* from, Wide<T>* sums) {
  Each<T>(n, [=](auto at) { at.Put(sums, at.Get(sums) + at.Get(from)); });
}

// In f64, which has no vectors of ours: a plain loop that the compiler turns into them.
template <class T>
double SumOfSquares(int64_t n, const T* x) {
  double sum[kSums] = {};
  const auto square = [x](int64_t i) {
    const auto value = static_cast<double>(static_cast<Wide<T>>(x[i]));
    return value * value;
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t l = 0; l < kSums; ++l) sum[l] += square(i + l);
  }
  for (int64_t l = 0; i < n; ++i, ++l) sum[l] += square(i);
  for (int64_t width = kSums / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) sum[l] += sum[l + width];
  }
  return sum[0];
}

template <class T>
void Gelu(int64_t n, const T* x, T* y) {
  Each<T>(n, [=](auto at) { at.Put(y, internal::GeluValue()(at.Get(x))); });
}

template <class T>
void GeluBackward(int64_t n, const T* dy, const T* x, T* dx) {
  Each<T>(n, [=](auto at) { at.Put(dx, internal::GeluSlope()(at.Get(dy), at.Get(x))); });
}

template <class T>
void SwiGlu(int64_t n, const T* gate, const T* up, T* y) {
  Each<T>(n, [=](auto at) { at.Put(y, internal::SwiGluValue()(at.Get(gate), at.Get(up))); });
}

// One pass over both gradients, because the exponential is most of the work.
template <class T>
void SwiGluBackward(int64_t n, const T* dy, const T* gate, const T* up, T* dgate, T* dup) {
  Each<T>(n, [=](auto at) {
    Vector<T> to_gate, to_up;
    internal::SwiGluSlopes()(to_gate, to_up, at.Get(dy), at.Get(gate), at.Get(up));
    at.Put(dgate, to_gate);
    at.Put(dup, to_up);
  });
}

// 1 / sqrt(mean(row^2) + eps). Squares of finite f32 values can overflow f32, which would silently
// turn the row into zeros: such a row is summed again in f64 (all rows that way would take twice
// the time).
template <class T>
Wide<T> InverseRms(int64_t n, const T* row, double eps) {
  using Real = Wide<T>;
  const Real square = SumOf<T>(n, [row](auto at) { return at.Get(row) * at.Get(row); });
  if (square - square == 0) {  // finite
    return Real(1) / SquareRoot(square / static_cast<Real>(n) + static_cast<Real>(eps));
  }
  return static_cast<Real>(1 / SquareRoot(SumOfSquares(n, row) / static_cast<double>(n) + eps));
}

template <class T>
void RmsNorm(int64_t rows, int64_t width, const T* x, const Wide<T>* w, double eps, T* y,
             Wide<T>* rstd) {
  for (int64_t t = 0; t < rows; ++t, x += width, y += width) {
    rstd[t] = InverseRms(width, x, eps);
    const Vector<T> r(rstd[t]);
    Each<T>(width, [=](auto at) { at.Put(y, at.Get(x) * r * at.Get(w)); });
  }
}

// With g = dy * w and xhat = x * rstd:  dx = rstd * (g - xhat * mean(g * xhat)),  dw += dy * xhat.
template <class T>
void RmsNormBackward(int64_t rows, int64_t width, const T* dy, const T* x, const Wide<T>* w,
                     const Wide<T>* rstd, T* dx, Wide<T>* dw) {
  for (int64_t t = 0; t < rows; ++t, x += width, dy += width, dx += width) {
    const Vector<T> r(rstd[t]);
    const Vector<T> mean(
        SumOf<T>(width, [=](auto at) { return at.Get(dy) * at.Get(w) * (at.Get(x) * r); }) /
        static_cast<Wide<T>>(width));
    Each<T>(width, [=](auto at) {
      const Vector<T> xhat = at.Get(x) * r, slope = at.Get(dy);
      at.Put(dw, at.Get(dw) + slope * xhat);
      at.Put(dx, r * (slope * at.Get(w) - xhat * mean));
    });
  }
}

template <class T>
void Rope(int64_t tokens, int64_t heads, int64_t half, const T* x, const Wide<T>* cosines,
          const Wide<T>* sines, Wide<T> direction, T* y) {
  const Vector<T> sign(direction);
  for (int64_t t = 0; t < tokens; ++t, cosines += half, sines += half) {
    for (int64_t h = 0; h < heads; ++h, x += 2 * half, y += 2 * half) {
      Each<T>(half, [=](auto at) {
        const Vector<T> a = at.Get(x), b = at.Get(x + half);
        const Vector<T> cosine = at.Get(cosines), sine = sign * at.Get(sines);
        at.Put(y, a * cosine - b * sine);
        at.Put(y + half, b * cosine + a * sine);
      });
    }
  }
}

template <class Real>
void AdamW(int64_t n, const internal::AdamWRule<Real>& rule, Real scale, const Real* __restrict g,
           Real* __restrict p, Real* __restrict m, Real* __restrict v, BF16* __restrict copy) {
  for (int64_t i = 0; i < n; ++i) rule(g[i] * scale, p[i], m[i], v[i]);
  if (copy != nullptr) Convert(n, p, copy);
}

template <class Real>
struct Extremes {
  Real min, max;
};

// Of the elements that are not NaN, unless the first one is.
template <class Real>
Extremes<Real> ExtremesOf(int64_t n, const Real* row) {
  constexpr int64_t kCount = LanesOf<Real>::kCount, kVectors = kSums / kCount;
  Vector<Real> low[kVectors], high[kVectors];
  for (int64_t k = 0; k < kVectors; ++k) low[k] = high[k] = Vector<Real>(row[0]);
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t k = 0; k < kVectors; ++k) {
      const Vector<Real> x = Load(row + i + k * kCount);
      low[k] = Min(x, low[k]);
      high[k] = Max(x, high[k]);
    }
  }
  Real lows[kSums], highs[kSums];
  for (int64_t k = 0; k < kVectors; ++k) {
    Store(lows + k * kCount, low[k]);
    Store(highs + k * kCount, high[k]);
  }
  Extremes<Real> all{row[0], row[0]};
  const auto add = [&all](Real least, Real most) {
    all.min = least < all.min ? least : all.min;
    all.max = most > all.max ? most : all.max;
  };
  for (int64_t l = 0; l < kSums; ++l) add(lows[l], highs[l]);
  for (; i < n; ++i) add(row[i], row[i]);
  return all;
}

// Log of the sum of exp over a row, run by run while a run is in the first cache level. Runs are
// summed in the row's dtype and relative to their own largest element, their sums in f64, so that
// a large vocabulary costs no accuracy. NaN for a row that holds a NaN or an infinity; -inf needs
// asking, since it would add a harmless zero.
template <class Real>
Real LogSumExp(int64_t n, const Real* row) {
  constexpr double kInfinity = __builtin_inf();
  double sum = 0, top = -kInfinity;  // the result is top + log(sum)
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t count = n - i < kRun ? n - i : kRun;
    const Real* run = row + i;
    const Extremes<Real> range = ExtremesOf(count, run);
    if (range.min == static_cast<Real>(-kInfinity)) return static_cast<Real>(__builtin_nan(""));
    const Vector<Real> max(range.max);
    // What pads the last vector must not count.
    const int64_t whole = count / LanesOf<Real>::kCount * LanesOf<Real>::kCount;
    Real part = SumOf<Real>(whole, [=](auto at) { return Exp(at.Get(run) - max); });
    for (int64_t j = whole; j < count; ++j) part += internal::Exp(run[j] - range.max);
    const auto run_sum = static_cast<double>(part), run_top = static_cast<double>(range.max);
    if (run_top > top) {
      sum = sum * __builtin_exp(top - run_top) + run_sum;
      top = run_top;
    } else {  // a NaN too, which makes the sum one
      sum += run_sum * __builtin_exp(run_top - top);
    }
  }
  return static_cast<Real>(top + __builtin_log(sum));
}

template <class T>
void SoftmaxGradient(int64_t n, const Wide<T>* logits, Wide<T> lse, Wide<T> factor, T* out) {
  const Vector<T> shift(lse), scale(factor);
  Each<T>(n, [=](auto at) { at.Put(out, Exp(at.Get(logits) - shift) * scale); });
}

template <class T>
constexpr RowKernels<T> TableOf() {
  using Other = typename RowKernels<T>::Other;
  return {.add = Add<T, T>,
          .add_other = Add<T, Other>,
          .to_other = Convert<T, Other>,
          .accumulate = Accumulate<T>,
          .sum_of_squares = SumOfSquares<T>,
          .gelu = Gelu<T>,
          .gelu_backward = GeluBackward<T>,
          .swiglu = SwiGlu<T>,
          .swiglu_backward = SwiGluBackward<T>,
          .rms_norm = RmsNorm<T>,
          .rms_norm_backward = RmsNormBackward<T>,
          .rope = Rope<T>,
          .adamw = AdamW<Wide<T>>,
          .log_sum_exp = LogSumExp<Wide<T>>,
          .softmax_gradient = SoftmaxGradient<T>};
}

}  // namespace
}  // namespace longspan::ops::LONGSPAN_ROW_SET
