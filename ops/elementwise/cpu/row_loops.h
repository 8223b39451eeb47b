#pragma once
#include "ops/activation/formulas.h"
#include "ops/elementwise/cpu/lane_functions.h"
#include "ops/elementwise/cpu/row_kernels.h"

// The text of RowKernels. Each row_kernels_*.cpp compiles it for one instruction set, in a
// namespace of that name and with internal linkage, so that no function of one set can end up in
// code of another. The formulas that it shares with other code are always inlined.
namespace longspan::ops::LONGSPAN_ROW_SET {
namespace {

constexpr int64_t kSums = 4 * kWidth;  // interleaved partial sums
constexpr int64_t kRun = 4096;         // elements that are summed in their own dtype

template <class T>
using Wide = Accumulator<T>;
template <class T>
using Vector = typename LanesOf<T>::Type;
template <class T>
using Deep = typename LanesOf<T>::Deep;
template <class T>
using Deepest = typename LanesOf<T>::Deepest;

inline float SquareRoot(float x) { return __builtin_sqrtf(x); }
inline double SquareRoot(double x) { return __builtin_sqrt(x); }

// How a step of a loop reaches its elements: those of V, or the few that are left at an end. Put
// and PutExact write results (the latter as RowKernels wants it of sums and conversions), Keep sums
// that are read again.
template <class V, bool kStream>
struct Whole {
  int64_t i;
  template <class T>
  V Get(const T* p) const {
    return LoadAs<V>(p + i);
  }
  template <class T>
  void Put(T* p, V x) const {
    Write<kStream, true>(p + i, x);
  }
  template <class T>
  void PutExact(T* p, V x) const {
    Write<kStream, false>(p + i, x);
  }
  template <class T>
  void Keep(T* p, V x) const {
    Write<false, false>(p + i, x);
  }
  template <class T>
  void Copy(T* to, const T* from) const {
    ops::LONGSPAN_ROW_SET::Copy<kStream, V>(to + i, from + i);
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
    Partial<true>(p, x);
  }
  template <class T, class V>
  void PutExact(T* p, V x) const {
    Partial<false>(p, x);
  }
  template <class T, class V>
  void Keep(T* p, V x) const {
    Partial<false>(p, x);
  }
  template <class T>
  void Copy(T* to, const T* from) const {
    for (int64_t l = 0; l < count; ++l) to[i + l] = from[i + l];
  }

 private:
  template <bool kNormal, class T, class V>
  void Partial(T* p, V x) const {
    T padded[kWidth];
    Write<false, kNormal>(padded, x);
    for (int64_t l = 0; l < count; ++l) p[i + l] = padded[l];
  }
};

// Elements before the first at which a line of the caches begins.
template <class T>
inline int64_t ToLine(const T* p) {
  const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(T));
  return -at & static_cast<int64_t>(64 / sizeof(T) - 1);
}

template <class V, bool kStream, class Step>
inline int64_t Steps(int64_t i, int64_t n, Step step) {
  for (; i + CountOf<V>() <= n; i += CountOf<V>()) step(Whole<V, kStream>{i});
  return i;
}

// step(at) for all of [0, n), which Puts into `outs`. Streams where all of them reach a line at the
// same element.
template <class T, bool kStream, class D = Deep<T>, class Step, class Out, class... More>
[[gnu::flatten]] inline void Each(int64_t n, Step step, [[maybe_unused]] const Out* out,
                                  [[maybe_unused]] const More*... more) {
  int64_t i = 0;
  if constexpr (kStream) {
    const int64_t line = ToLine(out), head = line < n ? line : n;
    if (((ToLine(more) == line) && ...)) {
      i = Steps<Vector<T>, false>(i, head, step);
      if (i < head) step(Rest{i, head - i});
      i = Steps<D, true>(head, n, step);
      i = Steps<Vector<T>, true>(i, n, step);
    }
  } else {
    i = Steps<D, false>(i, n, step);
  }
  i = Steps<Vector<T>, false>(i, n, step);
  if (i < n) step(Rest{i, n - i});
}

// At the end of a task: what it streamed is there for all threads.
template <bool kStream>
struct Finish {
  ~Finish() {
    if constexpr (kStream) StreamFence();
  }
};

// Sum over [0, n) of what term(at) gives, in an order fixed by n: interleaved sums, then a tree.
template <class T, class Term>
[[gnu::flatten]] inline Wide<T> SumOf(int64_t n, Term term) {
  constexpr int64_t kDeep = CountOf<Deep<T>>(), kOne = CountOf<Vector<T>>();
  Deep<T> sum[kSums / kDeep];
  for (Deep<T>& s : sum) s = Deep<T>(0.0);
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t k = 0; k < kSums / kDeep; ++k) {
      sum[k] = sum[k] + term(Whole<Deep<T>, false>{i + k * kDeep});
    }
  }
  Wide<T> lane[kSums];
  for (int64_t k = 0; k < kSums / kDeep; ++k) Write<false, false>(lane + k * kDeep, sum[k]);
  Wide<T>* to = lane;
  for (; i + kOne <= n; i += kOne, to += kOne) {
    Store(to, Load(to) + term(Whole<Vector<T>, false>{i}));
  }
  if (i < n) Store(to, Load(to) + term(Rest{i, n - i}));
  for (int64_t width = kSums / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

template <class A, class B, bool kStream>
void Add(int64_t n, const A* a, const B* b, A* out) {
  const Finish<kStream> finish;
  Each<A, kStream>(
      n, [=](auto at) { at.PutExact(out, at.Get(a) + at.Get(b)); }, out);
}

template <class From, class To, bool kStream>
void Convert(int64_t n, const From* from, To* to) {
  const Finish<kStream> finish;
  Each<From, kStream>(
      n, [=](auto at) { at.PutExact(to, at.Get(from)); }, to);
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

template <class T, bool kStream>
void Gelu(int64_t n, const T* x, T* y) {
  const Finish<kStream> finish;
  Each<T, kStream, Deepest<T>>(
      n, [=](auto at) { at.Put(y, internal::GeluValue()(at.Get(x))); }, y);
}

template <class T, bool kStream>
void GeluBackward(int64_t n, const T* dy, const T* x, T* dx) {
  const Finish<kStream> finish;
  Each<T, kStream, Deepest<T>>(
      n, [=](auto at) { at.Put(dx, internal::GeluSlope()(at.Get(dy), at.Get(x))); }, dx);
}

template <class T, bool kStream>
void SwiGlu(int64_t n, const T* gate, const T* up, T* y) {
  const Finish<kStream> finish;
  Each<T, kStream>(
      n, [=](auto at) { at.Put(y, internal::SwiGluValue()(at.Get(gate), at.Get(up))); }, y);
}

// One pass over both gradients, because the exponential is most of the work.
template <class T, bool kStream>
void SwiGluBackward(int64_t n, const T* dy, const T* gate, const T* up, T* dgate, T* dup) {
  const Finish<kStream> finish;
  const auto step = [=](auto at) {
    const auto slope = at.Get(dy);
    auto to_gate = slope, to_up = slope;
    internal::SwiGluSlopes()(to_gate, to_up, slope, at.Get(gate), at.Get(up));
    at.Put(dgate, to_gate);
    at.Put(dup, to_up);
  };
  Each<T, kStream>(n, step, dgate, dup);
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

template <class T, bool kStream>
void RmsNorm(int64_t rows, int64_t width, const T* x, const Wide<T>* w, double eps, T* y,
             Wide<T>* rstd) {
  const Finish<kStream> finish;
  for (int64_t t = 0; t < rows; ++t, x += width, y += width) {
    rstd[t] = InverseRms(width, x, eps);
    const Vector<T> r(rstd[t]);
    Each<T, kStream>(
        width, [=](auto at) { at.Put(y, at.Get(x) * r * at.Get(w)); }, y);
  }
}

// With g = dy * w and xhat = x * rstd:  dx = rstd * (g - xhat * mean(g * xhat)),  dw += dy * xhat.
template <class T, bool kStream>
void RmsNormBackward(int64_t rows, int64_t width, const T* dy, const T* x, const Wide<T>* w,
                     const Wide<T>* rstd, T* dx, Wide<T>* dw) {
  const Finish<kStream> finish;
  for (int64_t t = 0; t < rows; ++t, x += width, dy += width, dx += width) {
    const Vector<T> r(rstd[t]);
    const Vector<T> mean(
        SumOf<T>(width, [=](auto at) { return at.Get(dy) * at.Get(w) * (at.Get(x) * r); }) /
        static_cast<Wide<T>>(width));
    const auto step = [=](auto at) {
      const auto xhat = at.Get(x) * r, slope = at.Get(dy);
      at.Keep(dw, at.Get(dw) + slope * xhat);
      at.Put(dx, r * (slope * at.Get(w) - xhat * mean));
    };
    Each<T, kStream>(width, step, dx);
  }
}

template <class T, bool kStream>
void Rope(int64_t tokens, int64_t heads, int64_t half, const T* x, const Wide<T>* cosines,
          const Wide<T>* sines, Wide<T> direction, T* y) {
  const Finish<kStream> finish;
  const Vector<T> sign(direction);
  for (int64_t t = 0; t < tokens; ++t, cosines += half, sines += half) {
    for (int64_t h = 0; h < heads; ++h, x += 2 * half, y += 2 * half) {
      const auto step = [=](auto at) {
        const auto a = at.Get(x), b = at.Get(x + half);
        const auto cosine = at.Get(cosines), sine = sign * at.Get(sines);
        at.Put(y, a * cosine - b * sine);
        at.Put(y + half, b * cosine + a * sine);
      };
      Each<T, kStream>(half, step, y, y + half);
    }
  }
}

// Asks for the elements at `p`, so that they are there when it is their turn: rows of a table that
// follow each other are apart, and the processor foresees nothing.
template <class T>
inline void Prefetch(const T* p, int64_t n) {
  constexpr auto kLine = static_cast<int64_t>(64 / sizeof(T));
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i);
}

template <class T, class To, bool kStream>
void Gather(int64_t rows, int64_t width, const int32_t* ids, const T* table, To* out) {
  const Finish<kStream> finish;
  for (int64_t t = 0; t < rows; ++t, out += width) {
    const T* row = table + ids[t] * width;
    if (t + 1 < rows) Prefetch(table + ids[t + 1] * width, width);
    const auto step = [=](auto at) {
      if constexpr (std::is_same_v<T, To>) {
        at.Copy(out, row);
      } else {
        at.PutExact(out, at.Get(row));
      }
    };
    Each<T, kStream>(width, step, out);
  }
}

template <class T>
void ScatterAdd(int64_t count, const int32_t* tokens, const int32_t* ids, int64_t width,
                int64_t columns, const T* from, Wide<T>* sums) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = from + tokens[i] * width;
    Wide<T>* to = sums + ids[tokens[i]] * width;
    if (i + 1 < count) {
      Prefetch(from + tokens[i + 1] * width, columns);
      Prefetch(sums + ids[tokens[i + 1]] * width, columns);
    }
    Each<T, false>(
        columns, [=](auto at) { at.Keep(to, at.Get(to) + at.Get(row)); }, to);
  }
}

template <class Real>
void AdamW(int64_t n, const internal::AdamWRule<Real>& rule, Real scale, const Real* __restrict g,
           Real* __restrict p, Real* __restrict m, Real* __restrict v, BF16* __restrict copy) {
  for (int64_t i = 0; i < n; ++i) rule(g[i] * scale, p[i], m[i], v[i]);
  if (copy != nullptr) Convert<Real, BF16, false>(n, p, copy);
}

// The largest of the elements that are not NaN, unless the first one is.
template <class Real>
Real LargestOf(int64_t n, const Real* row) {
  constexpr int64_t kCount = CountOf<Deep<Real>>();
  Deep<Real> high(static_cast<double>(row[0]));
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) high = Max(LoadAs<Deep<Real>>(row + i), high);
  Real lane[kCount];
  Write<false, false>(lane, high);
  Real most = row[0];
  for (int64_t l = 0; l < kCount; ++l) most = lane[l] > most ? lane[l] : most;
  for (; i < n; ++i) most = row[i] > most ? row[i] : most;
  return most;
}

// The smallest of what was shown to it.
template <class V>
struct Lowest {
  V least;
  void Show(V x) { least = Min(x, least); }
  template <class Half>
  void Show(Twice<Half> x) {
    Show(Min(x.low, x.high));
  }
};

// The sum of e^(x - shift) over a run. NaN where it holds -infinity, which would add a harmless
// zero.
template <class Real>
Real SumOfExp(int64_t n, const Real* run, Real shift) {
  const Vector<Real> from(static_cast<double>(shift));
  Lowest<Vector<Real>> lowest{from};
  // What pads the last vector must not count.
  constexpr int64_t kCount = CountOf<Vector<Real>>();
  const int64_t whole = n / kCount * kCount;
  Real sum = SumOf<Real>(whole, [&lowest, from, run](auto at) {
    const auto x = at.Get(run);
    lowest.Show(x);
    return Exp(x - from);
  });
  Real lane[kCount];
  Write<false, false>(lane, lowest.least);
  Real least = lane[0];
  for (int64_t l = 1; l < kCount; ++l) least = lane[l] < least ? lane[l] : least;
  for (int64_t i = whole; i < n; ++i) {
    sum += internal::Exp(run[i] - shift);
    least = run[i] < least ? run[i] : least;
  }
  return least == static_cast<Real>(-__builtin_inf()) ? static_cast<Real>(__builtin_nan("")) : sum;
}

// Log of the sum of exp over a row, in one pass. Runs are summed in the row's dtype, their sums in
// f64, so that a large vocabulary costs no accuracy. Elements are taken relative to the largest of
// the first run, and to that of a later run which rises far above it: the difference of two numbers
// that far apart would be rounded by more than the result may be. NaN for a row that holds a NaN or
// an infinity.
template <class Real>
Real LogSumExp(int64_t n, const Real* row) {
  constexpr auto kMost = static_cast<Real>(0x1p16);
  const auto exp_of = [](Real x) { return __builtin_exp(static_cast<double>(x)); };
  Real shift = LargestOf(n < kRun ? n : kRun, row);
  double sum = 0;  // the result is shift + log(sum)
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t count = n - i < kRun ? n - i : kRun;
    Real part = SumOfExp(count, row + i, shift);
    if (!(part < kMost)) {  // or NaN, which stays one
      const Real larger = LargestOf(count, row + i);
      sum *= exp_of(shift - larger);
      shift = larger;
      part = SumOfExp(count, row + i, shift);
    }
    sum += static_cast<double>(part);
  }
  return static_cast<Real>(static_cast<double>(shift) + __builtin_log(sum));
}

// Not streamed: what follows reads these blocks while they are in a cache.
template <class T>
void SoftmaxGradient(int64_t n, const Wide<T>* logits, Wide<T> lse, Wide<T> factor, T* out) {
  const Vector<T> shift(static_cast<double>(lse)), scale(static_cast<double>(factor));
  Each<T, false>(
      n, [=](auto at) { at.Put(out, Exp(at.Get(logits) - shift) * scale); }, out);
}

// `kStream`: of the kernels with large outputs that are not read in the same task.
template <class T, bool kStream>
constexpr RowKernels<T> TableOf() {
  using Other = typename RowKernels<T>::Other;
  return {.add = Add<T, T, kStream>,
          .add_other = Add<T, Other, kStream>,
          .to_other = Convert<T, Other, kStream>,
          .gather = Gather<T, T, kStream>,
          .gather_other = Gather<T, Other, kStream>,
          .scatter_add = ScatterAdd<T>,
          .sum_of_squares = SumOfSquares<T>,
          .gelu = Gelu<T, kStream>,
          .gelu_backward = GeluBackward<T, kStream>,
          .swiglu = SwiGlu<T, kStream>,
          .swiglu_backward = SwiGluBackward<T, kStream>,
          .rms_norm = RmsNorm<T, kStream>,
          .rms_norm_backward = RmsNormBackward<T, kStream>,
          .rope = Rope<T, kStream>,
          .adamw = AdamW<Wide<T>>,
          .log_sum_exp = LogSumExp<Wide<T>>,
          .softmax_gradient = SoftmaxGradient<T>};
}

constexpr RowKernelSet SetOf(const char* name) {
  return {.name = name,
          .f32 = TableOf<float, false>(),
          .bf16 = TableOf<BF16, false>(),
          .f32_streaming = TableOf<float, kStreams>(),
          .bf16_streaming = TableOf<BF16, kStreams>()};
}

}  // namespace
}  // namespace longspan::ops::LONGSPAN_ROW_SET
