#include "ops/rope/rope.h"

#include <cmath>

#include "ops/core/dispatch.h"
#include "ops/core/parallel_for.h"
#include "ops/elementwise/cpu/row_kernels.h"
#include "ops/rope/rope_cuda.h"

namespace longspan::ops {
namespace {

constexpr int64_t kTokensPerTask = 32;
constexpr int64_t kMaxHeadDim = 1024;

template <class T>
void Rotate(Context& ctx, const Tensor& x, const RopeTable& table, Accumulator<T> direction,
            Tensor& y) {
  using Acc = Accumulator<T>;
  const int64_t heads = x.dim(1), half = x.dim(2) / 2, token = heads * x.dim(2);
  const T* in = x.data<T>();
  T* out = y.data<T>();
  const Acc *cosines = table.cos.data<Acc>(), *sines = table.sin.data<Acc>();
  const RowKernels<T>& rows = internal::Rows<T>(y.bytes());
  ParallelRanges(ctx, x.dim(0), kTokensPerTask, [&](int64_t begin, int64_t end) {
    rows.rope(end - begin, heads, half, in + begin * token, cosines + begin * half,
              sines + begin * half, direction, out + begin * token);
  });
}

Tensor Apply(Context& ctx, const char* op, const Tensor& x, const RopeTable& table, int direction) {
  LONGSPAN_CHECK(x.rank() == 3 && x.dim(2) % 2 == 0 && x.dim(2) <= kMaxHeadDim)
      << op << ": x is " << x.Describe() << ", not [T, H, D] with an even D of at most "
      << kMaxHeadDim;
  LONGSPAN_CHECK(table.cos.shape() == Shape({x.dim(0), x.dim(2) / 2}) &&
                 table.sin.shape() == table.cos.shape() &&
                 table.cos.dtype() == AccumulatorOf(x.dtype()) &&
                 table.sin.dtype() == table.cos.dtype())
      << op << ": table " << table.cos.Describe() << " for x " << x.Describe();
  Tensor y = ctx.Empty(x.shape(), x.dtype());
  LONGSPAN_ON_CUDA(ctx, internal::RotateCuda(ctx, op, x, table, direction, y));
  DispatchFloat(x.dtype(), op, [&]<class T>() {
    Rotate<T>(ctx, x, table, static_cast<Accumulator<T>>(direction), y);
  });
  return y;
}

template <class Acc>
void FillTable(Context& ctx, const int64_t* positions, int64_t tokens,
               const std::vector<double>& frequencies, Acc* cosines, Acc* sines) {
  const auto half = static_cast<int64_t>(frequencies.size());
  ParallelRanges(ctx, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto position = static_cast<double>(positions[t]);
      for (int64_t i = 0; i < half; ++i) {
        const double angle = position * frequencies[static_cast<size_t>(i)];
        cosines[t * half + i] = static_cast<Acc>(std::cos(angle));
        sines[t * half + i] = static_cast<Acc>(std::sin(angle));
      }
    }
  });
}

// In host memory first where the table is not, so that all devices turn by the same bits.
template <class Acc>
void MakeTable(Context& ctx, const int64_t* positions, const std::vector<double>& frequencies,
               RopeTable& table) {
  const int64_t tokens = table.cos.dim(0);
  if (ctx.device().kind == DeviceKind::kCpu) {
    FillTable(ctx, positions, tokens, frequencies, table.cos.data<Acc>(), table.sin.data<Acc>());
    return;
  }
  const auto size = static_cast<size_t>(table.cos.numel());
  std::vector<Acc> cosines(size), sines(size);
  FillTable(ctx, positions, tokens, frequencies, cosines.data(), sines.data());
  table.cos.WriteFrom(cosines.data());
  table.sin.WriteFrom(sines.data());
}

}  // namespace

std::vector<double> RopeFrequencies(const RopeOptions& options) {
  LONGSPAN_CHECK(options.head_dim >= 2 && options.head_dim % 2 == 0)
      << "RopeFrequencies: head_dim " << options.head_dim << " is not even and positive";
  LONGSPAN_CHECK(options.theta > 0) << "RopeFrequencies: theta " << options.theta;
  std::vector<double> frequencies(static_cast<size_t>(options.head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = std::pow(
        options.theta, -2.0 * static_cast<double>(i) / static_cast<double>(options.head_dim));
  }
  return frequencies;
}

RopeTable MakeRopeTable(Context& ctx, const Tensor& positions, const RopeOptions& options,
                        DType dtype) {
  const std::vector<double> frequencies = RopeFrequencies(options);
  LONGSPAN_CHECK(positions.rank() == 1 && positions.dtype() == DType::kI64 &&
                 positions.device().kind == DeviceKind::kCpu)
      << "MakeRopeTable: positions are " << positions.Describe() << " on "
      << ToString(positions.device()) << ", not i64[T] in host memory";
  LONGSPAN_CHECK(IsFloat(dtype)) << "MakeRopeTable: dtype " << ToString(dtype);
  const Shape shape{positions.dim(0), options.head_dim / 2};
  RopeTable table{ctx.Empty(shape, AccumulatorOf(dtype)), ctx.Empty(shape, AccumulatorOf(dtype))};
  if (dtype == DType::kF64) {
    MakeTable<double>(ctx, positions.data<int64_t>(), frequencies, table);
  } else {
    MakeTable<float>(ctx, positions.data<int64_t>(), frequencies, table);
  }
  return table;
}

Tensor RopeForward(Context& ctx, const Tensor& x, const RopeTable& table) {
  return Apply(ctx, "RopeForward", x, table, 1);
}

Tensor RopeBackward(Context& ctx, const Tensor& dy, const RopeTable& table) {
  return Apply(ctx, "RopeBackward", dy, table, -1);
}

}  // namespace longspan::ops
