#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "ops/core/context.h"
#include "ops/core/dtype.h"
#include "ops/core/parallel_for.h"

// Building blocks of the CPU kernels: runs of elements are widened to the accumulator dtype,
// computed on, and rounded once when stored. Plain loops over contiguous runs, so that the
// compiler vectorises them; nothing here depends on the number of threads.
namespace longspan::ops::internal {

constexpr int64_t kRunElements = 1024;    // one run: its scratch stays in the first cache level
constexpr int64_t kTaskElements = 32768;  // one task of an elementwise op
constexpr int64_t kSumLanes = 16;         // interleaved partial sums of RunSum

// The n elements at `in` as accumulators: `in` itself when no conversion is needed, else `scratch`.
template <class T>
const Accumulator<T>* Widen(const T* in, int64_t n, Accumulator<T>* scratch) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return in;
  } else {
    for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<Accumulator<T>>(in[i]);
    return scratch;
  }
}

// Where to compute the values of `out`: `out` itself when no conversion is needed, else `scratch`.
// Narrow() finishes the store.
template <class T>
Accumulator<T>* Staging(T* out, Accumulator<T>* scratch) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return out;
  } else {
    return scratch;
  }
}

template <class T>
void Narrow(const Accumulator<T>* staged, int64_t n, T* out) {
  if constexpr (!std::is_same_v<T, Accumulator<T>>) {
    for (int64_t i = 0; i < n; ++i) out[i] = T(staged[i]);
  }
}

// Sum of term(0) ... term(n - 1) in an order fixed by n: kSumLanes interleaved sums, then a tree.
template <class Sum, class Term>
Sum RunSum(int64_t n, Term term) {
  Sum lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int64_t l = 0; l < kSumLanes; ++l) lane[l] += term(i + l);
  }
  for (int64_t l = 0; i < n; ++i, ++l) lane[l] += term(i);
  for (int64_t width = kSumLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

// out[i] = f(in_0[i], in_1[i], ...) for i in [0, n). `out` overlaps no input.
template <class Out, class F, class... In>
void Map(Context& ctx, int64_t n, Out* out, F f, const In*... in) {
  using Acc = Accumulator<Out>;
  const auto apply = [f](Acc* __restrict to, int64_t count, const auto*... from) {
    for (int64_t j = 0; j < count; ++j) to[j] = f(from[j]...);
  };
  const auto run = [&]<size_t... kInput>(int64_t begin, int64_t end,
                                         std::index_sequence<kInput...>) {
    alignas(64) Acc staged[kRunElements];
    alignas(64) Acc scratch[sizeof...(In)][kRunElements];
    for (int64_t i = begin; i < end; i += kRunElements) {
      const int64_t count = std::min(kRunElements, end - i);
      Acc* to = Staging(out + i, staged);
      apply(to, count, Widen(in + i, count, scratch[kInput])...);
      Narrow(to, count, out + i);
    }
  };
  ParallelRanges(ctx, n, kTaskElements, [&](int64_t begin, int64_t end) {
    run(begin, end, std::index_sequence_for<In...>());
  });
}

// inout[i] = f(inout[i], in[i]) for i in [0, n).
template <class Out, class F, class In>
void Update(Context& ctx, int64_t n, Out* inout, F f, const In* in) {
  using Acc = Accumulator<Out>;
  ParallelRanges(ctx, n, kTaskElements, [&](int64_t begin, int64_t end) {
    alignas(64) Acc staged[kRunElements];
    alignas(64) Acc scratch[kRunElements];
    for (int64_t i = begin; i < end; i += kRunElements) {
      const int64_t count = std::min(kRunElements, end - i);
      Acc* to = const_cast<Acc*>(Widen(inout + i, count, staged));
      const Acc* from = Widen(in + i, count, scratch);
      for (int64_t j = 0; j < count; ++j) to[j] = f(to[j], from[j]);
      Narrow(to, count, inout + i);
    }
  });
}

}  // namespace longspan::ops::internal
