#include "parallel/context/plan.h"

#include <algorithm>

#include "ops/core/check.h"
#include "parallel/comm/arguments.h"
#include "parallel/context/builder.h"
#include "parallel/context/fingerprint.h"
#include "parallel/context/ulysses.h"

namespace longspan::parallel {
namespace {

bool DealsHeads(StrategyKind kind) {
  return kind == StrategyKind::kUlysses || kind == StrategyKind::kHybrid;
}

uint64_t HashOf(const ContextDemand& demand, const StrategyOptions& o) {
  return Fingerprint()
      .Add(demand.Hash())
      .Add(demand.ranks())
      .Add(static_cast<int>(o.kind))
      .Add(o.heads)
      .Add(o.ranks_per_node)
      .Add(o.stages)
      .Add(o.head_groups)
      .Add(o.keep_rows)
      .Add(o.ulysses_ranks)
      .Add(static_cast<int>(o.outer))
      .Add(static_cast<int>(o.deduplicate))
      .value();
}

void RequireUsable(const StrategyOptions& options, int64_t kv_heads, int ranks) {
  const std::vector<std::string> problems = options.Problems(kv_heads, ranks);
  if (problems.empty()) return;
  std::string text;
  for (const std::string& p : problems) text += (text.empty() ? "" : "; ") + p;
  throw InvalidArgument("MakePlan: " + text);
}

int64_t Size(const std::vector<int32_t>& v) { return static_cast<int64_t>(v.size()); }

// Rows of keys and gradients that move when heads are exchanged; programs of hybrid add theirs.
void CountUlysses(const UlyssesPlan& plan, PlanFigures& figures) {
  const int64_t mine = plan.local_tokens();
  for (const UlyssesStep& step : plan.steps) {
    const UlyssesShare& own = step.share(plan.index);
    const int64_t own_grads = Size(own.whole) + Size(own.partial);
    for (int r = 0; r < plan.ranks(); ++r) {
      if (r == plan.index) continue;
      const UlyssesShare& share = step.share(r);
      const int64_t theirs = plan.tokens[static_cast<size_t>(r)];
      figures.forward_sent_rows += mine * Size(share.keys);
      figures.forward_received_rows += theirs * Size(own.keys);
      figures.grad_sent_rows += theirs * own_grads;
      figures.grad_received_rows += mine * (Size(share.whole) + Size(share.partial));
    }
  }
}

void CountPrograms(const Program& forward, const Program& backward, PlanFigures& figures) {
  figures.forward_sent_rows += forward.SentRows(Arena::kWork);
  figures.forward_received_rows += forward.ReceivedRows(Arena::kWork);
  figures.backward_sent_rows += backward.SentRows(Arena::kWork);
  figures.backward_received_rows += backward.ReceivedRows(Arena::kWork);
  figures.grad_sent_rows += backward.SentRows(Arena::kGrad);
  figures.grad_received_rows += backward.ReceivedRows(Arena::kGrad);
}

// One rank needs no demand: its mask says everything.
std::shared_ptr<const AttentionPlan> PlanOfOne(const ops::AttentionPattern& pattern,
                                               int64_t kv_heads,
                                               std::shared_ptr<const ops::Documents> documents,
                                               const Placement& placement,
                                               const StrategyOptions& options) {
  auto plan = std::make_shared<AttentionPlan>();
  const ops::BlockList& all = placement.blocks(0);
  plan->strategy = options.kind;
  plan->kv_heads = kv_heads;
  plan->local_tokens = all.tokens();
  plan->whole = ops::BlockMask::Build(pattern, kv_heads, std::move(documents), all, all);
  plan->visible_pairs = plan->whole->TotalVisiblePairs();
  plan->figures.work_max = plan->figures.work_mean = static_cast<double>(plan->visible_pairs);
  return plan;
}

}  // namespace

const char* ToString(StrategyKind kind) {
  switch (kind) {
    case StrategyKind::kRing:
      return "RING";
    case StrategyKind::kDoubleRing:
      return "DOUBLE_RING";
    case StrategyKind::kAllGather:
      return "ALL_GATHER";
    case StrategyKind::kUlysses:
      return "ULYSSES";
    case StrategyKind::kHybrid:
      return "HYBRID";
    case StrategyKind::kExchange:
      return "EXCHANGE";
    case StrategyKind::kAuto:
      return "AUTO";
  }
  return "?";
}

std::vector<std::string> StrategyOptions::Problems(int64_t kv_heads, int ranks) const {
  std::vector<std::string> problems;
  const auto require = [&](bool holds, const std::string& text) {
    if (!holds) problems.push_back(text);
  };
  const auto at_least_0 = [&](int64_t value, const char* field) {
    require(value >= 0, Str(field, " is ", value, "; it must be 0 (chosen) or more"));
  };
  require(kind != StrategyKind::kAuto,
          "strategy AUTO has no plan of its own; let ChooseStrategy choose one first");
  require(heads >= 0 && (heads == 0 || (kv_heads > 0 && heads % kv_heads == 0)),
          Str("heads is ", heads, "; it must be a multiple of the ", kv_heads, " kv heads"));
  at_least_0(ranks_per_node, "ranks_per_node");
  at_least_0(stages, "stages");
  at_least_0(head_groups, "head_groups");
  at_least_0(ulysses_ranks, "ulysses_ranks");
  require(keep_rows >= 0, Str("keep_rows is ", keep_rows, "; it must be 0 or more"));
  if (kind == StrategyKind::kDoubleRing && ranks_per_node > 0) {
    require(ranks % ranks_per_node == 0,
            Str("strategy DOUBLE_RING needs whole nodes, but ", ranks,
                " ranks are no multiple of ranks_per_node = ", ranks_per_node));
  }
  if (kind == StrategyKind::kHybrid) {
    require(ulysses_ranks <= 0 || ranks % ulysses_ranks == 0,
            Str("ulysses_ranks is ", ulysses_ranks, "; it must divide the ", ranks, " ranks"));
    require(outer == StrategyKind::kRing || outer == StrategyKind::kExchange,
            Str("outer is ", ToString(outer), "; it must be RING or EXCHANGE"));
  }
  return problems;
}

struct PlanMaker::Parts {
  std::shared_ptr<const ContextDemand> demand;
  StrategyOptions options;
  std::unique_ptr<const ProgramBuilder> builder;  // of strategies whose queries stay at home
  std::shared_ptr<const UlyssesLayout> layout;    // of the others
  PlanFigures figures;                            // of all ranks alike
};

PlanMaker::PlanMaker(std::shared_ptr<const ContextDemand> demand, const StrategyOptions& options) {
  const int ranks = static_cast<int>(demand->ranks());
  RequireUsable(options, demand->kv_heads(), ranks);
  auto parts = std::make_unique<Parts>();
  parts->options = options;
  parts->figures.hash = HashOf(*demand, options);
  const int64_t group = std::max<int64_t>(options.heads, demand->kv_heads()) / demand->kv_heads();
  if (DealsHeads(options.kind)) {
    parts->layout = MakeUlyssesLayout(*demand, options);
  } else if (ranks > 1) {
    parts->builder = std::make_unique<const ProgramBuilder>(*demand, options);
  }
  double total = 0;
  for (int r = 0; r < ranks; ++r) {
    const double work =
        parts->layout != nullptr
            ? static_cast<double>(UlyssesWork(*parts->layout, r)) / static_cast<double>(group)
            : static_cast<double>(demand->TotalPairs(r));
    parts->figures.work_max = std::max(parts->figures.work_max, work);
    total += work;
  }
  parts->figures.work_mean = total / ranks;
  parts->demand = std::move(demand);
  parts_ = std::move(parts);
}

PlanMaker::~PlanMaker() = default;

std::shared_ptr<const AttentionPlan> PlanMaker::Build(int rank, bool with_masks) const {
  const ContextDemand& demand = *parts_->demand;
  LONGSPAN_CHECK(rank >= 0 && rank < demand.ranks())
      << "MakePlan: rank " << rank << " of " << demand.ranks();
  auto plan = std::make_shared<AttentionPlan>();
  plan->strategy = parts_->options.kind;
  plan->rank = rank;
  plan->ranks = static_cast<int>(demand.ranks());
  plan->kv_heads = demand.kv_heads();
  plan->local_tokens = demand.placement().local_tokens(rank);
  plan->figures = parts_->figures;
  plan->figures.lower_bound_rows = demand.LowerBoundRows(rank);
  plan->visible_pairs = demand.TotalPairs(rank);
  if (plan->ranks == 1) {
    const ops::BlockList& all = demand.placement().blocks(0);
    if (with_masks) plan->whole = demand.Mask(all, all);
  } else if (parts_->layout != nullptr) {
    plan->ulysses = MakeUlyssesPlan(demand, *parts_->layout, rank, with_masks);
    CountUlysses(*plan->ulysses, plan->figures);
    for (const UlyssesStep& step : plan->ulysses->steps) {
      CountPrograms(step.forward, step.backward, plan->figures);
    }
  } else {
    Programs programs = parts_->builder->Build(rank, with_masks);
    plan->forward = std::move(programs.forward);
    plan->backward = std::move(programs.backward);
    CountPrograms(plan->forward, plan->backward, plan->figures);
  }
  return plan;
}

std::shared_ptr<const AttentionPlan> MakePlan(const ops::AttentionPattern& pattern,
                                              int64_t kv_heads,
                                              std::shared_ptr<const ops::Documents> documents,
                                              std::shared_ptr<const Placement> placement,
                                              const StrategyOptions& options, int rank) {
  RequireUsable(options, kv_heads, static_cast<int>(placement->ranks()));
  if (placement->ranks() == 1) {
    LONGSPAN_CHECK(rank == 0) << "MakePlan: rank " << rank << " of 1";
    return PlanOfOne(pattern, kv_heads, std::move(documents), *placement, options);
  }
  return PlanMaker(
             ContextDemand::Build(pattern, kv_heads, std::move(documents), std::move(placement)),
             options)
      .Build(rank);
}

std::shared_ptr<const AttentionPlan> MakePlan(const ops::AttentionPattern& pattern,
                                              int64_t kv_heads,
                                              std::shared_ptr<const ops::Documents> documents,
                                              const Placement& placement,
                                              const StrategyOptions& options, int rank) {
  return MakePlan(pattern, kv_heads, std::move(documents),
                  std::make_shared<const Placement>(placement), options, rank);
}

void CheckSamePlan(Communicator& comm, const AttentionPlan& plan) {
  CheckSamePlans(comm, plan.figures.hash);
}

void CheckSamePlans(Communicator& comm, uint64_t fingerprint, int first, int ranks) {
  const ControlTraffic control(comm);
  const auto hash = static_cast<int64_t>(fingerprint);
  // The largest hash, and the largest complement of one, which is that of the smallest.
  const Tensor both = internal::HostTensor({2}, DType::kI64);
  both.data<int64_t>()[0] = hash;
  both.data<int64_t>()[1] = ~hash;
  comm.AllReduce(both, ReduceOp::kMax).Wait();
  if (both.data<int64_t>()[0] == ~both.data<int64_t>()[1]) return;

  const Tensor mine = internal::HostTensor({1}, DType::kI64);
  const Tensor all = internal::HostTensor({comm.size()}, DType::kI64);
  mine.data<int64_t>()[0] = hash;
  comm.AllGather(mine, all).Wait();
  throw CommError(DifferingPlans({all.data<int64_t>(), static_cast<size_t>(comm.size())}, first,
                                 ranks > 0 ? ranks : comm.size()));
}

std::string DifferingPlans(std::span<const int64_t> fingerprints, int first, int ranks) {
  const auto count = [&](int64_t h) { return std::ranges::count(fingerprints, h); };
  int64_t usual = fingerprints[0];  // of equally many ranks, that of the lowest one
  for (const int64_t h : fingerprints) {
    if (count(h) > count(usual)) usual = h;
  }
  std::string others;
  for (size_t r = 0; r < fingerprints.size(); ++r) {
    if (fingerprints[r] == usual) continue;
    others += Str(others.empty() ? "" : ", ", first + static_cast<int>(r));
  }
  if (others.empty()) return "";
  return Str("ranks made their plans of attention from different patterns, documents, placements ",
             "or options: rank ", others, " of ", ranks, " differ",
             others.find(',') == others.npos ? "s" : "",
             " from the others; all ranks must read the same data and configuration");
}

}  // namespace longspan::parallel
