// Sums: a block adds a fixed run of the tensor, one more block the runs, both in an order that
// their sizes decide.
#include <algorithm>

#include "ops/core/cuda/reduce.cuh"
#include "ops/elementwise/map_cuda.cuh"
#include "ops/optim/optim_cuda.h"

namespace longspan::ops::internal {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxRuns = 2048;
constexpr int64_t kShortestRun = int64_t{kThreads} * 4 * kPackElements;

// partial[block] = sum of term over elements [block * run, (block + 1) * run); `run` is a multiple
// of N.
template <int N, class T, class Term>
__global__ void __launch_bounds__(kThreads)
    PartialSumKernel(int64_t n, int64_t run, const T* data, Term term, double* partial) {
  const int64_t begin = blockIdx.x * run, end = begin + run < n ? begin + run : n;
  double sum = 0;
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * N; i < end; i += kThreads * N) {
    if (i + N <= end) {
      const Pack<T, N> in = PackAt<N>(data, i);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += term(static_cast<double>(in.element[j]));
    } else {
      for (int64_t j = i; j < end; ++j) sum += term(static_cast<double>(data[j]));
    }
  }
  sum = cuda::BlockSum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    AddPartialsKernel(int64_t count, const double* partial, double* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = cuda::BlockSum<kThreads>(sum);
  if (threadIdx.x == 0) total[0] += sum;
}

template <class Term>
void AddSumOf(Context& ctx, const char* op, const Tensor& t, Term term, Tensor& total) {
  const int64_t n = t.numel();
  if (n == 0) return;
  // Whole packs: the runs of an aligned tensor start at 16 bytes.
  const int64_t run = std::max(kShortestRun, (n / kMaxRuns / kPackElements + 1) * kPackElements);
  const int64_t runs = (n + run - 1) / run;
  const Tensor partial = ctx.Empty({runs}, DType::kF64);
  DispatchGpuFloat(t.dtype(), op, [&]<class T>() {
    const auto kernel = Aligned16(t.raw()) ? PartialSumKernel<kPackElements, T, Term>
                                           : PartialSumKernel<1, T, Term>;
    cuda::Launch(ctx.cuda(), op, kernel, {dim3(cuda::GridSize(runs)), dim3(kThreads)}, n, run,
                 t.data<T>(), term, partial.data<double>());
  });
  cuda::Launch(ctx.cuda(), op, AddPartialsKernel, {dim3(1), dim3(kThreads)}, runs,
               partial.data<double>(), total.data<double>());
}

__global__ void StepControlKernel(const double* sums, const double* squares, double clip_norm,
                                  double skips_allowed, double* record) {
  DecideStep(sums, squares[0], clip_norm, skips_allowed, record);
}

struct AdamWArrays {
  const float* grad;
  float *p, *m, *v;
  BF16* copy;  // nullptr: none
};

// Elements [0, head) and what is left after the packs are one thread's each; the packs between
// start at 16 bytes (8 in the copy).
template <int N>
__global__ void __launch_bounds__(kThreads)
    AdamWKernel(int64_t n, int64_t head, int64_t packs, AdamWRule<float> rule, const double* record,
                AdamWArrays a) {
  if (record != nullptr && record[kStepApply] == 0) return;
  const float scale = record != nullptr ? static_cast<float>(record[kStepGradScale]) : 1.0f;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t < packs) {
    const int64_t i = head + t * N;
    const Pack<float, N> g = PackAt<N>(a.grad, i);
    Pack<float, N> p = PackAt<N>(a.p, i), m = PackAt<N>(a.m, i), v = PackAt<N>(a.v, i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      rule(g.element[j] * scale, p.element[j], m.element[j], v.element[j]);
    }
    PackAt<N>(a.p, i) = p;
    PackAt<N>(a.m, i) = m;
    PackAt<N>(a.v, i) = v;
    if (a.copy != nullptr) StoreRounded(a.copy + i, p.element);
    return;
  }
  const int64_t rest = t - packs, i = rest < head ? rest : packs * N + rest;
  if (i >= n) return;
  rule(a.grad[i] * scale, a.p[i], a.m[i], a.v[i]);
  if (a.copy != nullptr) a.copy[i] = BF16(a.p[i]);
}

// Elements before all arrays are aligned for packs of 4; -1 when they never are together.
int64_t HeadOf(const AdamWArrays& a) {
  for (int64_t head = 0; head < 4; ++head) {
    if (Aligned16(a.grad + head) && Aligned16(a.p + head) && Aligned16(a.m + head) &&
        Aligned16(a.v + head) &&
        (a.copy == nullptr || reinterpret_cast<uintptr_t>(a.copy + head) % 8 == 0)) {
      return head;
    }
  }
  return -1;
}

}  // namespace

void AddSumOfSquaresCuda(Context& ctx, const Tensor& t, Tensor& total) {
  AddSumOf(ctx, "AddSumOfSquares", t, Square(), total);
}

void AddNotFiniteCuda(Context& ctx, const Tensor& t, Tensor& total) {
  AddSumOf(ctx, "AddNotFinite", t, NotFinite(), total);
}

void StepControlCuda(Context& ctx, const Tensor& sums, const Tensor& squares,
                     const StepControlOptions& options, Tensor& record) {
  cuda::Launch(ctx.cuda(), "StepControl", StepControlKernel, {dim3(1), dim3(1)},
               sums.data<double>(), squares.data<double>(), options.clip_norm,
               options.skips_allowed, record.data<double>());
}

void AdamWStepCuda(Context& ctx, const AdamWRule<float>& rule, const Tensor& record, Tensor& master,
                   const Tensor& grad, Tensor& m, Tensor& v, const Tensor& compute_copy) {
  constexpr int kPack = 4;
  const AdamWArrays arrays{grad.data<float>(), master.data<float>(), m.data<float>(),
                           v.data<float>(),
                           compute_copy.defined() ? compute_copy.data<BF16>() : nullptr};
  const int64_t n = master.numel(), aligned = HeadOf(arrays);
  const int64_t head = aligned < 0 ? n : std::min(aligned, n), packs = (n - head) / kPack;
  const int64_t threads = n - packs * (kPack - 1);
  cuda::Launch(ctx.cuda(), "AdamWStep", AdamWKernel<kPack>, cuda::Cover(threads, kThreads), n, head,
               packs, rule, record.defined() ? record.data<double>() : nullptr, arrays);
}

}  // namespace longspan::ops::internal
