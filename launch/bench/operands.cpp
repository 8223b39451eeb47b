#include "launch/bench/operands.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/core/cuda/backend.h"
#include "ops/core/parallel_for.h"
#include "ops/core/rng.h"

namespace longspan::launch {
namespace {

// Distinct values on a GPU, whose operands are too large to be computed on the host each time.
constexpr int64_t kDistinct = int64_t{1} << 22;

std::vector<double> ToDoubles(const Tensor& t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  DispatchFloat(t.dtype(), "RelativeDifference", [&]<class T>() {
    std::vector<T> from(values.size());
    t.ReadTo(from.data());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(from[i]);
  });
  return values;
}

}  // namespace

Tensor RandomTensor(Context& ctx, Shape shape, DType dtype, uint64_t seed, double scale) {
  Tensor t = ctx.Empty(shape, dtype);
  const Philox random(seed, StreamOf("bench"));
  const bool on_host = ctx.device().kind == DeviceKind::kCpu;
  const int64_t n = on_host ? t.numel() : std::min(t.numel(), kDistinct);
  DispatchFloat(dtype, "RandomTensor", [&]<class T>() {
    std::vector<T> staged(on_host ? 0 : static_cast<size_t>(n));
    T* to = on_host ? t.data<T>() : staged.data();
    ParallelRanges(ctx, n, 1 << 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        to[i] = static_cast<T>(
            static_cast<Accumulator<T>>(scale * random.Normal(static_cast<uint64_t>(i))));
      }
    });
    if (!on_host) t.WriteRange(0, static_cast<size_t>(n) * sizeof(T), staged.data());
  });
  if (on_host) return t;
  for (size_t done = static_cast<size_t>(n) * SizeOf(dtype); done < t.bytes();) {
    const size_t part = std::min(done, t.bytes() - done);
    cuda::CopyOnDevice(ctx.cuda(), t.raw() + done, t.raw(), part);
    done += part;
  }
  return t;
}

double RelativeDifference(const Tensor& a, const Tensor& b) {
  LONGSPAN_CHECK(a.shape() == b.shape())
      << "RelativeDifference: " << a.Describe() << " and " << b.Describe();
  const std::vector<double> x = ToDoubles(a), y = ToDoubles(b);
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (x[i] - y[i]) * (x[i] - y[i]);
    norm += y[i] * y[i];
  }
  const double relative = std::sqrt(difference / norm);
  return std::isfinite(relative) ? relative : std::numeric_limits<double>::infinity();
}

double AllowedDifference(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return 1e-12;
    case DType::kBF16:
      return 1.6e-2;
    default:
      return 1e-5;
  }
}

}  // namespace longspan::launch
