#include "launch/bench/moba_bench.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>

#include "launch/bench/attention_operands.h"

namespace longspan::launch {
namespace {

constexpr const char* kWhole = "routed attention";  // category of one run

// Operands and results of one case; forward and backward of any implementation.
class MobaRun {
 public:
  MobaRun(Context& ctx, const AttentionCase& c)
      : ctx_(ctx),
        plan_(ops::MobaPlan::Build(*c.moba, c.kv_heads,
                                   std::make_shared<const ops::Documents>(c.Documents()))),
        x_(ctx, c) {}

  ops::MobaResult Forward(const std::string& implementation) {
    const TraceScope trace(ctx_.trace(), kWhole);
    return ops::MobaForward(ctx_, x_.q, x_.k, x_.v, *plan_, {.implementation = implementation});
  }
  ops::MobaGradients Backward(const std::string& implementation, const ops::MobaResult& saved) {
    const TraceScope trace(ctx_.trace(), kWhole);
    const Tensor delta = ops::AttentionDelta(ctx_, x_.d_out, saved.o);
    return ops::MobaBackward(ctx_, x_.d_out, x_.q, x_.k, x_.v, saved.lse, delta, saved.lists,
                             *plan_, {.implementation = implementation});
  }
  AttentionValues Values(const std::string& implementation) {
    const ops::MobaResult result = Forward(implementation);
    const ops::MobaGradients grads = Backward(implementation, result);
    return {result.o, result.lse, grads.dq, grads.dk, grads.dv};
  }

  // (query, key) pairs over all query heads.
  double ChosenPairs(const ops::MobaResult& result) const {
    double pairs =
        static_cast<double>(plan_->own->TotalVisiblePairs() * (x_.q.dim(1) / x_.k.dim(1)));
    if (plan_->width() == 0) return pairs;
    std::vector<int64_t> offsets(static_cast<size_t>(result.lists.offsets.numel()));
    result.lists.offsets.ReadTo(offsets.data());
    const size_t heads = static_cast<size_t>(x_.q.dim(1));
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
  AttentionOperands x_;
};

void Check(Context& ctx, const AttentionCase& problem, const std::string& implementation) {
  const AttentionCase small = SmallVersion(problem);
  Context host(ContextOptions{.threads = ctx.threads()});
  RequireSameValues(problem, implementation, MobaRun(ctx, small).Values(implementation),
                    MobaRun(host, small).Values(kReference));
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
      ChooseAttention(ctx, problem, options.implementation);
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
  std::vector<BenchRecord> records;
  const auto measure = [&](bool backward, double flops, double bytes,
                           const std::function<void(const std::string&)>& once) {
    BenchRecord r = RecordOf("attention", problem.name, backward, problem.dtype, peaks);
    r.flops = flops;
    r.bytes = bytes;
    r.visible_fraction = pairs / (static_cast<double>(problem.heads) * tokens * (tokens + 1) / 2);
    for (const std::string& name : implementations) {
      const std::map<std::string, double> before = ctx.trace().Totals();
      r.implementation = name;
      r.timing = options.Time(ctx, {[&] { once(name); }}).front();
      if (ctx.device().kind == DeviceKind::kCpu) r.shares = SharesSince(ctx, before);
      records.push_back(r);
    }
  };
  if (options.forward) {
    measure(false, 4 * pairs * dim, (q + kv) * size + q * wide,
            [&](const std::string& name) { run.Forward(name); });
  }
  if (options.backward) {
    measure(true, 10 * pairs * dim, (2 * q + kv) * size + q * wide + (q + kv) * wide,
            [&](const std::string& name) { run.Backward(name, saved); });
  }
  return records;
}

}  // namespace longspan::launch
