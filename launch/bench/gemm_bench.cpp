#include "launch/bench/gemm_bench.h"

#include <functional>

#include "launch/bench/operands.h"
#include "ops/gemm/gemm.h"

namespace longspan::launch {
namespace {

DType ResultType(const GemmCase& c) {
  return c.role == GemmRole::kDw ? AccumulatorOf(c.dtype) : c.dtype;
}

class GemmRun {
 public:
  GemmRun(Context& ctx, const GemmCase& c)
      : ctx_(ctx),
        transpose_a_(c.role == GemmRole::kDw),
        transpose_b_(c.role == GemmRole::kForward),
        accumulate_(c.role == GemmRole::kDw),
        a_(RandomTensor(ctx, transpose_a_ ? Shape{c.k, c.m} : Shape{c.m, c.k}, c.dtype, 1)),
        b_(RandomTensor(ctx, transpose_b_ ? Shape{c.n, c.k} : Shape{c.k, c.n}, c.dtype, 2)),
        c_(RandomTensor(ctx, {c.m, c.n}, ResultType(c), 3)) {}

  void Run(const std::string& implementation) {
    ops::Gemm(ctx_, a_, transpose_a_, b_, transpose_b_, c_,
              {.accumulate = accumulate_, .implementation = implementation});
  }
  const Tensor& result() const { return c_; }
  double bytes() const {
    return static_cast<double>(a_.bytes() + b_.bytes() + (accumulate_ ? 2 : 1) * c_.bytes());
  }

 private:
  Context& ctx_;
  bool transpose_a_, transpose_b_, accumulate_;
  Tensor a_, b_, c_;
};

void Check(Context& ctx, const GemmCase& problem, const std::string& implementation) {
  const GemmCase small = SmallVersion(problem);
  Context host(ContextOptions{.threads = ctx.threads()});
  GemmRun expected(host, small), got(ctx, small);
  expected.Run(kReference);
  got.Run(implementation);
  RequireAgreement(problem.name, implementation, "the product",
                   RelativeDifference(got.result(), expected.result()), problem.dtype);
}

}  // namespace

std::vector<BenchRecord> BenchGemm(Context& ctx, const GemmCase& problem,
                                   const BenchOptions& options, const MachinePeaks& peaks) {
  const bool backward = problem.role == GemmRole::kDx || problem.role == GemmRole::kDw;
  if (backward ? !options.backward : !options.forward) return {};
  std::vector<Candidate> candidates;
  for (const ops::GemmImplementation& entry : ops::GemmImplementations()) {
    if (entry.device != ctx.device().kind) continue;
    candidates.push_back({entry.name, entry.rejects({problem.dtype, ResultType(problem)})});
  }
  const std::vector<std::string> implementations =
      ChooseImplementations(problem.name, candidates, options.implementation);
  for (const std::string& name : implementations) {
    if (name != kReference) Check(ctx, problem, name);
  }

  GemmRun run(ctx, problem);
  std::vector<std::function<void()>> runs;
  for (const std::string& name : implementations) runs.push_back([&run, &name] { run.Run(name); });
  const std::vector<Timing> timings = options.Time(ctx, runs);
  std::vector<BenchRecord> records;
  for (size_t i = 0; i < implementations.size(); ++i) {
    BenchRecord r = RecordOf("gemm", problem.name, backward, problem.dtype, peaks);
    r.implementation = implementations[i];
    r.timing = timings[i];
    r.flops = 2.0 * static_cast<double>(problem.m) * static_cast<double>(problem.n) *
              static_cast<double>(problem.k);
    r.bytes = run.bytes();
    records.push_back(r);
  }
  return records;
}

}  // namespace longspan::launch
