#include "ops/gemm/gemm.h"

#include <algorithm>

#include "ops/core/trace.h"
#include "ops/elementwise/elementwise.h"
#include "ops/gemm/gemm_cuda.h"
#include "ops/gemm/gemm_tiles.h"

namespace longspan::ops {
namespace {

// ThreadSanitizer cannot follow code that a library generates at run time.
#ifdef __SANITIZE_THREAD__
constexpr bool kLibraryAllowed = false;
#else
constexpr bool kLibraryAllowed = true;
#endif

std::string OneDnnRejects(const GemmProblem& problem) {
  if (!kLibraryAllowed) return "this is a ThreadSanitizer build";
  if (problem.operands == DType::kF64) return "oneDNN has no f64";
  if (problem.operands == DType::kBF16 && !internal::OneDnnHasBf16()) {
    return "oneDNN has no bf16 instructions to use on this processor";
  }
  return "";
}

std::string OneDnnWidenedRejects(const GemmProblem& problem) {
  if (!kLibraryAllowed) return "this is a ThreadSanitizer build";
  if (problem.operands != DType::kBF16) return "only bf16 operands are widened";
  return "";
}

std::string ReferenceRejects(const GemmProblem&) { return ""; }

std::string CublasLtRejects(const GemmProblem& problem) {
  return problem.operands == DType::kF64 ? "GPUs multiply f32 and bf16 only" : "";
}

using Run = void (*)(Context&, const internal::GemmCall&);
constexpr Run kRuns[] = {internal::RunCublasLt, internal::RunOneDnn, internal::RunOneDnnWidened,
                         internal::RunReference};

// Index into the table; throws when the one asked for does not exist or declines.
size_t Choose(Device device, const GemmProblem& problem, const std::string& wanted) {
  const auto& table = GemmImplementations();
  std::string names, last_reason;
  for (size_t i = 0; i < table.size(); ++i) {
    if (table[i].device == device.kind) names += Str(table[i].name, ", ");
    if (!wanted.empty() && wanted != table[i].name) continue;
    if (table[i].device != device.kind) {
      if (wanted.empty()) continue;
      throw InvalidArgument(Str("Gemm: implementation ", wanted, " does not run on ",
                                ToString(device), "; leave it empty there"));
    }
    const std::string reason = table[i].rejects(problem);
    if (reason.empty()) return i;
    if (!wanted.empty()) {
      throw InvalidArgument(Str("Gemm: implementation ", wanted, " cannot multiply ",
                                ToString(problem.operands), " here: ", reason));
    }
    last_reason = reason;
  }
  if (wanted.empty()) {
    throw Unsupported(Str("Gemm: nothing multiplies ", ToString(problem.operands), " on ",
                          ToString(device), ": ", last_reason));
  }
  throw InvalidArgument(
      Str("Gemm: there is no implementation named ", wanted, "; use ", names, "or leave it empty"));
}

void CheckDtypes(const Tensor& a, const Tensor& b, const Tensor& c) {
  LONGSPAN_CHECK(IsFloat(a.dtype()) && a.dtype() == b.dtype())
      << "Gemm: operands " << a.Describe() << " and " << b.Describe() << " need one float dtype";
  LONGSPAN_CHECK(c.dtype() == AccumulatorOf(a.dtype()) || c.dtype() == a.dtype())
      << "Gemm: a result " << c.Describe() << " of " << ToString(a.dtype()) << " operands";
}

}  // namespace

const std::vector<GemmImplementation>& GemmImplementations() {
  static const std::vector<GemmImplementation> table = {
      {"cublaslt", DeviceKind::kCuda, CublasLtRejects},
      {"onednn", DeviceKind::kCpu, OneDnnRejects},
      {"onednn_widened", DeviceKind::kCpu, OneDnnWidenedRejects},
      {"reference", DeviceKind::kCpu, ReferenceRejects}};
  return table;
}

const char* Gemm(Context& ctx, const Tensor& a, bool transpose_a, const Tensor& b, bool transpose_b,
                 Tensor& c, const GemmOptions& options) {
  LONGSPAN_CHECK(a.rank() == 2 && b.rank() == 2 && c.rank() == 2)
      << "Gemm: " << a.Describe() << ", " << b.Describe() << " and " << c.Describe()
      << " must be matrices";
  CheckDtypes(a, b, c);
  const int64_t m = a.dim(transpose_a ? 1 : 0), k = a.dim(transpose_a ? 0 : 1);
  const int64_t n = b.dim(transpose_b ? 0 : 1);
  LONGSPAN_CHECK(b.dim(transpose_b ? 1 : 0) == k && c.dim(0) == m && c.dim(1) == n)
      << "Gemm: " << a.Describe() << (transpose_a ? "^T" : "") << " times " << b.Describe()
      << (transpose_b ? "^T" : "") << " into " << c.Describe();
  const size_t chosen = Choose(ctx.device(), {a.dtype(), c.dtype()}, options.implementation);
  if (m > 0 && n > 0) {
    if (k > 0) {
      TraceScope scope(ctx.trace(), "gemm");
      kRuns[chosen](ctx, {a, b, c, transpose_a, transpose_b, options.accumulate, m, n, k});
    } else if (!options.accumulate) {
      Fill(ctx, c, 0);
    }
  }
  return GemmImplementations()[chosen].name;
}

namespace internal {

GemmTiling ChooseTiling(int64_t m, int64_t n, int64_t k, int64_t max_rows, int64_t max_columns) {
  constexpr int64_t kSmallest = 64, kTiles = 16, kWorthATask = int64_t{1} << 20;
  const auto ceil = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  // An even cut in multiples of 16, so that no tile is a sliver; wide ones in multiples of 64,
  // which libraries compute with.
  const auto even = [&](int64_t size, int64_t tile) {
    return ceil(ceil(size, ceil(size, tile)), 16) * 16;
  };
  GemmTiling t{even(m, max_rows), even(n, max_columns)};
  if (t.columns > 256) t.columns = std::min(max_columns, ceil(t.columns, 64) * 64);
  // Rows first: wide tiles are faster than high ones.
  while (ceil(m, t.rows) * ceil(n, t.columns) < kTiles &&
         t.rows * t.columns * k > 2 * kWorthATask && std::max(t.rows, t.columns) > kSmallest) {
    int64_t& cut = t.rows > kSmallest ? t.rows : t.columns;
    cut = even(cut, (cut + 1) / 2);
  }
  return t;
}

}  // namespace internal
}  // namespace longspan::ops
