#include "launch/bench/context_parallel_bench.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <memory>
#include <mutex>

#include "launch/bench/operands.h"
#include "launch/picture/mask_facts.h"
#include "parallel/comm/counting.h"
#include "parallel/comm/local.h"
#include "parallel/comm/simulated.h"
#include "parallel/context/balance.h"
#include "parallel/context/choose.h"
#include "parallel/context/predict.h"
#include "parallel/context/strategy.h"

namespace longspan::launch {
namespace {

using namespace parallel;
using Plans = std::vector<std::shared_ptr<const AttentionPlan>>;

std::string Lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

std::string MaskName(const AttentionCase& c) {
  std::string name = c.name.substr(0, c.name.find(Str("_", ToString(c.dtype), "_")));
  return c.document_tokens > 0 ? name + "_documents" : name;
}

// What the ranks of one pass did.
struct Measured {
  int64_t moved_bytes = 0;
  double step_s = 0, compute_s = 0, exposed_s = 0;
};
struct BothPasses {
  Measured forward, backward;
};

// A layout of one case: everything that strategies share.
struct Setting {
  const AttentionCase& problem;
  const ContextParallelOptions& options;
  NetworkOptions network;
  int ranks;
  PlacementKind kind;
  std::shared_ptr<const ops::Documents> documents;
  std::shared_ptr<const Placement> placement;
  std::shared_ptr<const ContextDemand> demand;
  MaskFacts facts;
  double balance_floor = 1;

  PlanSizes Sizes() const {
    return {.heads = problem.heads,
            .head_dim = problem.head_dim,
            .dtype = problem.dtype,
            .sigmoid = problem.IsSigmoid()};
  }
  int64_t RowBytes(bool gradients) const {
    const DType dtype = gradients ? AccumulatorOf(problem.dtype) : problem.dtype;
    return 2 * problem.head_dim * static_cast<int64_t>(SizeOf(dtype));
  }
  // Of the mean rank, forward.
  double ForwardFlops() const {
    const double pairs = static_cast<double>(facts.visible_pairs) *
                         static_cast<double>(problem.heads / problem.kv_heads);
    return 4 * pairs * static_cast<double>(problem.head_dim) / ranks;
  }
};

Setting MakeSetting(const AttentionCase& c, const ContextParallelOptions& options, int ranks,
                    PlacementKind kind) {
  Setting s{.problem = c,
            .options = options,
            .network = options.network,
            .ranks = ranks,
            .kind = kind,
            .documents = std::make_shared<const ops::Documents>(c.Documents()),
            .placement = nullptr,
            .demand = nullptr,
            .facts = {}};
  const ops::BlockList all = ops::BlockList::All(*s.documents);
  const auto mask = ops::BlockMask::Build(c.pattern, c.kv_heads, s.documents, all, all);
  s.facts = FactsOf(*mask);
  const BalanceLayer layer{c.pattern};
  s.placement = std::make_shared<const Placement>(
      kind == PlacementKind::kBalanced
          ? BalancedPlacement({&layer, 1}, c.kv_heads, s.documents, ranks)
          : Placement(kind, 1, c.tokens, ranks));
  const BalanceFigures balance =
      MeasureBalance(*s.placement, BlockRowWork({&layer, 1}, c.kv_heads, s.documents));
  if (balance.mean > 0) {
    s.balance_floor = static_cast<double>(balance.floor) / static_cast<double>(balance.mean);
  }
  s.demand = ContextDemand::Build(c.pattern, c.kv_heads, s.documents, s.placement);
  if (options.dense_ring_time > 0 && ranks > 1) {  // one rank sends nothing
    const double keys = static_cast<double>((ranks - 1) * c.tokens / ranks * c.kv_heads) *
                        static_cast<double>(s.RowBytes(false));
    const double seconds = s.ForwardFlops() / s.network.flops_per_s * options.dense_ring_time;
    s.network.intra.bytes_per_s = s.network.inter.bytes_per_s = keys / seconds;
  }
  return s;
}

Plans MakePlans(const Setting& s, const StrategyOptions& strategy, bool with_masks) {
  Plans plans;
  const PlanMaker maker(s.demand, strategy);
  for (int rank = 0; rank < s.ranks; ++rank) plans.push_back(maker.Build(rank, with_masks));
  return plans;
}

// Both passes of all ranks as they are in training, on random operands.
BothPasses Run(const Setting& s, const Plans& plans) {
  const AttentionCase& c = s.problem;
  BothPasses result;
  std::mutex mutex;
  SimulatedNetwork network(s.ranks, s.network);
  RunLocal(
      s.ranks,
      [&](Communicator& world) {
        SimulatedCommunicator simulated(world, network);
        CountingCommunicator comm(simulated);
        Context ctx(ContextOptions{.threads = 1});
        ctx.SetProgress([&] { comm.Progress(); });
        const auto rank = static_cast<uint64_t>(comm.rank());
        const int64_t t = s.placement->local_tokens(comm.rank());
        const Tensor q = RandomTensor(ctx, {t, c.heads, c.head_dim}, c.dtype, 4 * rank + 1);
        const Tensor k = RandomTensor(ctx, {t, c.kv_heads, c.head_dim}, c.dtype, 4 * rank + 2);
        const Tensor v = RandomTensor(ctx, {t, c.kv_heads, c.head_dim}, c.dtype, 4 * rank + 3);
        const Tensor d_out = RandomTensor(ctx, {t, c.heads, c.head_dim}, c.dtype, 4 * rank + 4);
        ops::AttentionOptions how;
        how.normalization = c.normalization;
        const AttentionPlan& plan = *plans[rank];
        const auto note = [&](Measured& pass) {
          const double now = simulated.now_s(), compute = simulated.compute_s();
          const double exposed = simulated.exposed_s();
          const std::lock_guard lock(mutex);
          pass.moved_bytes += comm.counts().Total().bytes;
          pass.step_s = std::max(pass.step_s, now);
          pass.compute_s = std::max(pass.compute_s, compute);
          pass.exposed_s = std::max(pass.exposed_s, exposed);
        };
        simulated.ResetClocks();
        comm.ResetCounts();
        const auto saved = ContextAttentionForward(ctx, comm, plan, q, k, v, how);
        note(result.forward);
        simulated.ResetClocks();
        comm.ResetCounts();
        ContextAttentionBackward(ctx, comm, plan, d_out, q, k, v, saved, how);
        note(result.backward);
      },
      {.timeout_s = 0});
  return result;
}

// What plans say about one pass.
struct PassPlan {
  int64_t sent = 0, worst = 0, lower_bound = 0, dense_ring = 0;
  double predicted_s = 0, compute_s = 0, exposed_s = 0;
};

int64_t SentBytes(const Timeline& timeline) {
  int64_t bytes = 0;
  for (const TimelineEvent& event : timeline) {
    for (const TimelineMessage& message : event.sends) bytes += message.bytes;
  }
  return bytes;
}
int64_t ReceivedBytes(const Timeline& timeline) {
  int64_t bytes = 0;
  for (const TimelineEvent& event : timeline) {
    for (const TimelineMessage& message : event.recvs) bytes += message.bytes;
  }
  return bytes;
}

PassPlan PlanOf(const Setting& s, const Plans& plans, bool backward) {
  PassPlan pass;
  std::vector<Timeline> timelines;
  for (const auto& plan : plans) {
    PlanTimelines both = MakeTimelines(*plan, s.Sizes());
    timelines.push_back(std::move(backward ? both.backward : both.forward));
    const int64_t sent = SentBytes(timelines.back()), received = ReceivedBytes(timelines.back());
    pass.sent += sent;
    pass.worst = std::max({pass.worst, sent, received});
    // Nothing has to be fetched again by those who keep it.
    const bool fetches = !backward || plan->figures.backward_received_rows > 0;
    const int64_t rows = plan->figures.lower_bound_rows;
    pass.lower_bound +=
        (fetches ? rows * s.RowBytes(false) : 0) + (backward ? rows * s.RowBytes(true) : 0);
  }
  const Prediction prediction = Predict(s.network, timelines);
  pass.predicted_s = prediction.largest.finish_s;
  pass.compute_s = prediction.largest.compute_s;
  pass.exposed_s = prediction.largest.exposed_s;
  return pass;
}

BenchRecord Describe(const Setting& s, const std::string& strategy, const Plans& plans,
                     const PassPlan& planned, const PassPlan& ring, const Measured* measured,
                     bool backward, double plan_ms) {
  const AttentionCase& c = s.problem;
  const Measured shown =
      measured != nullptr ? *measured
                          : Measured{0, planned.predicted_s, planned.compute_s, planned.exposed_s};
  BenchRecord r;
  r.op = "context_parallel";
  r.name = c.name;
  r.pass = backward ? "backward" : "forward";
  r.implementation = Lower(ToString(plans[0]->strategy));
  r.device = measured != nullptr ? "simulated" : "planned";
  r.threads = 1;
  r.timing = {1e3 * shown.step_s, 1e3 * shown.step_s, 1};
  r.flops = s.ForwardFlops() * (backward ? 2.5 : 1);
  for (const auto& plan : plans) {
    const double rows = static_cast<double>(plan->figures.lower_bound_rows);
    r.bytes = std::max(r.bytes, rows * static_cast<double>(s.RowBytes(backward)));
  }
  r.visible_fraction = s.facts.visible_fraction;
  r.block_fraction = s.facts.block_fraction;
  r.peak_gflops = s.network.flops_per_s * 1e-9;
  r.peak_gbps = s.network.intra.bytes_per_s * 1e-9;
  r.labels = {
      {"mask", MaskName(c)}, {"strategy", strategy}, {"placement", Lower(ToString(s.kind))}};
  const PlanFigures& figures = plans[0]->figures;
  const auto add = [&](const char* key, double value) { r.more.emplace_back(key, value); };
  add("ranks", s.ranks);
  add("ranks_per_node", s.network.ranks_per_node);
  add("bytes_planned", static_cast<double>(planned.sent));
  if (measured != nullptr) add("bytes_moved", static_cast<double>(shown.moved_bytes));
  add("worst_rank_bytes", static_cast<double>(planned.worst));
  add("lower_bound_bytes", static_cast<double>(planned.lower_bound));
  add("dense_ring_bytes", static_cast<double>(ring.sent));
  add("work_max_over_mean", figures.work_mean > 0 ? figures.work_max / figures.work_mean : 1);
  add("balance_floor", s.balance_floor);
  add("compute_ms", 1e3 * shown.compute_s);
  add("exposed_ms", 1e3 * shown.exposed_s);
  add("step_ms", 1e3 * shown.step_s);
  add("predicted_ms", 1e3 * planned.predicted_s);
  add("plan_ms", plan_ms);
  return r;
}

double MillisecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

void BenchStrategy(const Setting& s, StrategyOptions strategy, const Plans& ring,
                   const std::function<void(const BenchRecord&)>& emit) {
  strategy.heads = s.problem.heads;
  if (strategy.ranks_per_node == 0) strategy.ranks_per_node = s.network.ranks_per_node;
  const std::string name = Lower(ToString(strategy.kind));
  if (strategy.kind == StrategyKind::kAuto) {
    strategy = ChooseStrategy(s.demand, strategy, s.Sizes(), s.network);
  }
  const auto start = std::chrono::steady_clock::now();
  (void)PlanMaker(s.demand, strategy).Build(0);
  const double plan_ms = MillisecondsSince(start);
  const Plans plans = MakePlans(s, strategy, !s.options.plan_only);
  BothPasses measured;
  if (!s.options.plan_only) measured = Run(s, plans);
  for (const bool backward : {false, true}) {
    if (!(backward ? s.options.backward : s.options.forward)) continue;
    const Measured* pass = s.options.plan_only ? nullptr
                           : backward          ? &measured.backward
                                               : &measured.forward;
    emit(Describe(s, name, plans, PlanOf(s, plans, backward), PlanOf(s, ring, backward), pass,
                  backward, plan_ms));
  }
}

}  // namespace

void BenchContextParallel(const AttentionCase& c, const ContextParallelOptions& options,
                          const std::function<void(const BenchRecord&)>& emit) {
  if (c.moba.has_value() || c.timed_kv_heads > 0) {
    throw InvalidArgument(Str("benchmark case \"", c.name,
                              "\": context_parallel takes neither moba nor G; leave them out"));
  }
  for (const int ranks : options.ranks) {
    for (const PlacementKind kind : options.placements) {
      const Setting s = MakeSetting(c, options, ranks, kind);
      const Plans ring = MakePlans(s, {.kind = StrategyKind::kRing, .heads = c.heads}, false);
      for (const StrategyOptions& strategy : options.strategies) {
        BenchStrategy(s, strategy, ring, emit);
      }
    }
  }
}

std::string ContextParallelHead(size_t name_width) {
  char text[256];
  std::snprintf(text, sizeof text, "%-*s  %-8s  %-12s %-10s %4s %9s %9s %9s %8s %10s %10s %10s",
                static_cast<int>(name_width), "case", "pass", "strategy", "placement", "P",
                "MB sent", "MB bound", "of ring", "max/mean", "compute ms", "exposed ms",
                "step ms");
  return text;
}

std::string ContextParallelLine(const BenchRecord& r, size_t name_width) {
  const auto value = [&](const char* key) {
    for (const auto& [name, number] : r.more) {
      if (name == key) return number;
    }
    return 0.0;
  };
  std::string strategy = r.labels[1].second;
  if (strategy != r.implementation) strategy = "a:" + r.implementation;
  const double ring = value("dense_ring_bytes");
  char text[512];
  std::snprintf(text, sizeof text,
                "%-*s  %-8s  %-12s %-10s %4.0f %9.2f %9.2f %8.1f%% %8.3f %10.3f %10.3f %10.3f",
                static_cast<int>(name_width), r.name.c_str(), r.pass.c_str(), strategy.c_str(),
                r.labels[2].second.c_str(), value("ranks"), value("bytes_planned") * 1e-6,
                value("lower_bound_bytes") * 1e-6,
                ring > 0 ? 100 * value("bytes_planned") / ring : 0.0, value("work_max_over_mean"),
                value("compute_ms"), value("exposed_ms"), value("step_ms"));
  return text;
}

}  // namespace longspan::launch
