#include "launch/bench/moba_bench.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>

#include "launch/bench/operands.h"

namespace longspan::launch {
namespace {

constexpr const char* kWhole = "routed attention";  // category of one run

// Operands and results of one case; forward and backward of any implementation.
class MobaRun {
 public:
  MobaRun(Context& ctx, const AttentionCase& c)
      : ctx_(ctx),
        plan_(ops::MobaPlan::Build(*c.moba, c.kv_heads,
                                   std::make_shared<const ops::Documents>(c.Documents()))) {
    const Shape query_shape{c.tokens, c.heads, c.head_dim},
        key_shape{c.tokens, c.kv_heads, c.head_dim};
    q_ = RandomTensor(ctx, query_shape, c.dtype, 1);
    k_ = RandomTensor(ctx, key_shape, c.dtype, 2);
    v_ = RandomTensor(ctx, key_shape, c.dtype, 3);
    d_out_ = RandomTensor(ctx, query_shape, c.dtype, 4);
  }

  ops::MobaResult Forward(const std::string& implementation) {
    const TraceScope trace(ctx_.trace(), kWhole);
    return ops::MobaForward(ctx_, q_, k_, v_, *plan_, {.implementation = implementation});
  }
  ops::MobaGradients Backward(const std::string& implementation, const ops::MobaResult& saved) {
    const TraceScope trace(ctx_.trace(), kWhole);
    const Tensor delta = ops::AttentionDelta(ctx_, d_out_, saved.o);
    return ops::MobaBackward(ctx_, d_out_, q_, k_, v_, saved.lse, delta, saved.lists, *plan_,
                             {.implementation = implementation});
  }

  // (query, key) pairs over all query heads.
  double ChosenPairs(const ops::MobaResult& result) const {
    double pairs = static_cast<double>(plan_->own->TotalVisiblePairs() * (q_.dim(1) / k_.dim(1)));
    if (plan_->width() == 0) return pairs;
    std::vector<int64_t> offsets(static_cast<size_t>(result.lists.offsets.numel()));
    result.lists.offsets.ReadTo(offsets.data());
    const size_t heads = static_cast<size_t>(q_.dim(1));
    for (int64_t b = 0; b < plan_->blocks->count(); ++b) {
      const size_t list = static_cast<size_t>(b) * heads;
      pairs +=
          static_cast<double>((offsets[list + heads] - offsets[list]) * plan_->blocks->TokensOf(b));
    }
    return pairs;
  }

 private:
  Context& ctx_;
  std::shared_ptr<const ops::MobaPlan> plan_;
  Tensor q_, k_, v_, d_out_;
};

void Check(Context& ctx, const AttentionCase& problem, const std::string& implementation) {
  const AttentionCase small = SmallVersion(problem);
  Context host(ContextOptions{.threads = ctx.threads()});
  MobaRun expected(host, small), got(ctx, small);
  const ops::MobaResult reference = expected.Forward(kReference);
  const ops::MobaResult result = got.Forward(implementation);
  const auto require = [&](const char* what, const Tensor& a, const Tensor& b) {
    RequireAgreement(problem.name, implementation, what, RelativeDifference(a, b), problem.dtype);
  };
  require("o", result.o, reference.o);
  require("lse", result.lse, reference.lse);
  const ops::MobaGradients want = expected.Backward(kReference, reference);
  const ops::MobaGradients grads = got.Backward(implementation, result);
  require("dq", grads.dq, want.dq);
  require("dk", grads.dk, want.dk);
  require("dv", grads.dv, want.dv);
}

std::vector<std::string> Implementations(Context& ctx, const AttentionCase& problem,
                                         const std::string& wanted) {
  const std::vector<std::string> routed = ops::MobaImplementations(ctx.device().kind);
  std::vector<Candidate> candidates;
  for (const ops::AttentionImplementation& entry : ops::AttentionImplementations()) {
    if (entry.device != ctx.device().kind ||
        std::find(routed.begin(), routed.end(), entry.name) == routed.end()) {
      continue;
    }
    candidates.push_back(
        {entry.name, entry.rejects({.dtype = problem.dtype,
                                    .heads = problem.heads,
                                    .kv_heads = problem.kv_heads,
                                    .head_dim = problem.head_dim,
                                    .shared_bytes = ops::AttentionSharedBytes(ctx)})});
  }
  return ChooseImplementations(problem.name, candidates, wanted);
}

// Shares of the runs since `before`, from the categories of the Context's trace.
std::vector<std::pair<std::string, double>> SharesSince(
    Context& ctx, const std::map<std::string, double>& before) {
  const std::map<std::string, double> now = ctx.trace().Totals();
  const auto seconds = [&](const char* category) {
    const auto at = now.find(category), old = before.find(category);
    return (at == now.end() ? 0 : at->second) - (old == before.end() ? 0 : old->second);
  };
  const double whole = seconds(kWhole);
  if (whole <= 0) return {};
  const double gather = seconds("attention gather");
  return {{"gate", seconds("attention gate") / whole},
          {"lists", seconds("attention lists") / whole},
          {"gather", gather / whole},
          {"attention", (seconds("attention") - gather) / whole}};
}

}  // namespace

std::vector<BenchRecord> BenchMoba(Context& ctx, const AttentionCase& problem,
                                   const BenchOptions& options, const MachinePeaks& peaks) {
  const std::vector<std::string> implementations =
      Implementations(ctx, problem, options.implementation);
  for (const std::string& name : implementations) {
    if (name != kReference) Check(ctx, problem, name);
  }
  MobaRun run(ctx, problem);
  const ops::MobaResult saved = run.Forward(implementations.front());
  const double pairs = run.ChosenPairs(saved), tokens = static_cast<double>(problem.tokens);
  const double dim = static_cast<double>(problem.head_dim);
  const double q = tokens * static_cast<double>(problem.heads) * dim;
  const double kv = 2 * tokens * static_cast<double>(problem.kv_heads) * dim;
  const double size = static_cast<double>(SizeOf(problem.dtype));
  const double wide = static_cast<double>(SizeOf(AccumulatorOf(problem.dtype)));
  BenchRecord record;
  record.op = "attention";
  record.name = problem.name;
  record.device = peaks.device;
  record.threads = peaks.threads;
  record.visible_fraction =
      pairs / (static_cast<double>(problem.heads) * tokens * (tokens + 1) / 2);
  record.peak_gflops = PeakGflops(peaks, problem.dtype);
  record.peak_gbps = peaks.copy_gbps;

  std::vector<BenchRecord> records;
  const auto measure = [&](const std::function<void(const std::string&)>& once) {
    for (const std::string& name : implementations) {
      const std::map<std::string, double> before = ctx.trace().Totals();
      record.implementation = name;
      record.timing = options.Time(ctx, {[&] { once(name); }}).front();
      if (ctx.device().kind == DeviceKind::kCpu) record.shares = SharesSince(ctx, before);
      records.push_back(record);
    }
  };
  if (options.forward) {
    record.pass = "forward";
    record.flops = 4 * pairs * dim;
    record.bytes = (q + kv) * size + q * wide;
    measure([&](const std::string& name) { run.Forward(name); });
  }
  if (options.backward) {
    record.pass = "backward";
    record.flops = 10 * pairs * dim;
    record.bytes = (2 * q + kv) * size + q * wide + (q + kv) * wide;
    measure([&](const std::string& name) { run.Backward(name, saved); });
  }
  return records;
}

}  // namespace longspan::launch
