#include <algorithm>
#include <numeric>

#include "ops/core/check.h"
#include "parallel/context/ulysses.h"

namespace longspan::parallel {
namespace {

// Head groups in flight when none are asked for.
constexpr int64_t kUlyssesSteps = 4, kHybridSteps = 2;

int64_t Size(const std::vector<int32_t>& v) { return static_cast<int64_t>(v.size()); }

// Visible pairs of one query head of each kv head, over all ranks.
std::vector<int64_t> WorkOfHeads(const ContextDemand& demand) {
  std::vector<int64_t> of_pattern(static_cast<size_t>(demand.patterns()), 0);
  for (int64_t p = 0; p < demand.patterns(); ++p) {
    for (int r = 0; r < demand.ranks(); ++r)
      of_pattern[static_cast<size_t>(p)] += demand.Pairs(p, r);
  }
  std::vector<int64_t> work;
  for (int64_t h = 0; h < demand.kv_heads(); ++h) {
    work.push_back(of_pattern[static_cast<size_t>(demand.pattern_of(h))]);
  }
  return work;
}

int64_t Steps(const HeadDeal& deal, int64_t group, int64_t asked, bool hybrid) {
  int64_t most_queries = 1, most_kv = 1;
  for (const auto& queries : deal.queries) {
    int64_t kv = 0;
    for (size_t i = 0; i < queries.size(); ++i) {
      kv += i == 0 || queries[i] / group != queries[i - 1] / group;
    }
    most_kv = std::max(most_kv, kv);
    most_queries = std::max(most_queries, Size(queries));
  }
  if (asked > 0) return std::min(asked, std::max(most_kv, most_queries));
  const int64_t wanted = hybrid ? kHybridSteps : kUlyssesSteps;
  return most_kv > 1 ? std::min(wanted, most_kv) : std::min<int64_t>(2, most_queries);
}

// Query heads of equal kv head, as counts.
std::vector<std::pair<int32_t, int64_t>> CountsOfKvHeads(const std::vector<int32_t>& queries,
                                                         int64_t group) {
  std::vector<std::pair<int32_t, int64_t>> counts;
  for (const int32_t q : queries) {
    const int32_t kv = static_cast<int32_t>(q / group);
    if (counts.empty() || counts.back().first != kv) counts.emplace_back(kv, 0);
    ++counts.back().second;
  }
  return counts;
}

// The steps of one rank; `shared`: kv heads that several ranks of the group have.
std::vector<UlyssesShare> SharesOf(const std::vector<std::vector<int32_t>>& steps, int64_t group,
                                   const std::vector<bool>& shared) {
  std::vector<UlyssesShare> shares;
  for (size_t s = 0; s < steps.size(); ++s) {
    UlyssesShare share;
    share.queries = steps[s];
    const auto counts = CountsOfKvHeads(steps[s], group);
    share.group = 0;
    for (const auto& [kv, count] : counts) share.group = std::gcd(share.group, count);
    // Only the one kv head of a rank is ever spread over steps.
    const bool same_keys = s > 0 && steps[s - 1].back() / group == counts.front().first;
    share.key_step = same_keys ? shares.back().key_step : static_cast<int32_t>(s);
    for (size_t slot = 0; slot < counts.size(); ++slot) {
      const auto& [kv, count] = counts[slot];
      if (!same_keys) share.keys.push_back(kv);
      for (int64_t i = 0; i < count / share.group; ++i) {
        share.kv_heads.push_back(kv);
        share.slots.push_back(static_cast<int32_t>(slot));
      }
    }
    if (same_keys) shares.back().whole.clear(), shares.back().partial.clear();
    for (const auto& [kv, count] : counts) {
      (shared[static_cast<size_t>(kv)] ? share.partial : share.whole).push_back(kv);
    }
    shares.push_back(std::move(share));
  }
  return shares;
}

std::vector<bool> SharedKvHeads(const HeadDeal& deal, int64_t group, int64_t kv_heads) {
  std::vector<int> holders(static_cast<size_t>(kv_heads), 0);
  for (const auto& queries : deal.queries) {
    for (const auto& [kv, count] : CountsOfKvHeads(queries, group)) {
      ++holders[static_cast<size_t>(kv)];
    }
  }
  std::vector<bool> shared;
  for (const int n : holders) shared.push_back(n > 1);
  return shared;
}

StrategyOptions OuterOptions(const StrategyOptions& options, int group_ranks) {
  StrategyOptions outer = options;
  outer.kind = options.outer;
  outer.heads = 0;
  // Ranks of equal place in neighbouring groups share a node when it holds several groups.
  const int node = options.ranks_per_node;
  outer.ranks_per_node = node > 0 && node % group_ranks == 0   ? node / group_ranks
                         : node > 0 && group_ranks % node == 0 ? 1
                                                               : 0;
  return outer;
}

// The programs between groups, and how many transfers every rank posts: ranks whose program has
// fewer post empty ones, so that all ranks of cp issue the same operations.
void PlanOuter(const ContextDemand& demand, const StrategyOptions& options, UlyssesLayout& layout) {
  const StrategyOptions outer = OuterOptions(options, layout.group_ranks);
  const auto whole =
      ContextDemand::Build(demand.pattern(), demand.kv_heads(), demand.documents(), layout.grouped);
  for (const auto& shares : layout.steps) {
    auto& places = layout.outer.emplace_back();
    size_t forward = 0, backward = 0;
    for (const UlyssesShare& share : *shares) {
      places.emplace_back();
      if (share.kv_heads.empty()) continue;
      places.back().demand = whole->SelectHeads(share.kv_heads);
      places.back().builder = std::make_shared<const ProgramBuilder>(*places.back().demand, outer);
      const Programs programs = places.back().builder->Build(0, /*with_masks=*/false);
      forward = std::max(forward, programs.forward.transfers.size());
      backward = std::max(backward, programs.backward.transfers.size());
    }
    layout.forward_transfers.push_back(forward);
    layout.backward_transfers.push_back(backward);
  }
}

// Messages to places in the group become messages to ranks of cp, and there are `transfers` of
// them.
void MoveToCp(const UlyssesLayout& layout, int index, size_t transfers, Program& program) {
  const auto rename = [&](std::vector<Message>& messages) {
    for (Message& m : messages) m.peer = m.peer * layout.group_ranks + index;
  };
  for (Transfer& t : program.transfers) rename(t.sends), rename(t.recvs);
  LONGSPAN_CHECK(program.transfers.size() <= transfers)
      << "ranks of a group differ in the transfers of their programs";
  while (program.transfers.size() < transfers) {
    const auto at = static_cast<int32_t>(program.transfers.size());
    program.transfers.emplace_back();
    program.instructions.push_back({Instruction::Op::kPost, at});
    program.instructions.push_back({Instruction::Op::kWait, at});
  }
}

// [T, heads] of this rank's tokens -> for every rank of the group [T, its heads], one after
// another.
template <class Heads>
HeadGather PackOf(const UlyssesStep& step, const UlyssesPlan& plan, int64_t all_heads,
                  const Heads& heads_of) {
  HeadGather gather;
  gather.tokens = plan.local_tokens();
  int64_t at = 0;
  for (const UlyssesShare& share : *step.shares) {
    const std::vector<int32_t>& heads = heads_of(share);
    for (size_t i = 0; i < heads.size(); ++i) {
      gather.Add(at + static_cast<int64_t>(i), Size(heads), heads[i], all_heads);
    }
    at += gather.tokens * Size(heads);
  }
  return gather;
}

// [2, N, virtual kv heads] of dK and dV -> [N, 2, heads]: virtual heads of one kv head are added.
HeadGather SumOf(const UlyssesShare& share, const std::vector<int32_t>& heads, int64_t tokens) {
  HeadGather gather;
  gather.tokens = tokens;
  const int64_t virtual_heads = Size(share.kv_heads), leaving = Size(heads);
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < leaving; ++i) {
      bool first = true;
      for (int64_t v = 0; v < virtual_heads; ++v) {
        if (share.kv_heads[static_cast<size_t>(v)] != heads[static_cast<size_t>(i)]) continue;
        const int64_t from = half * tokens * virtual_heads + v;
        if (first) {
          gather.Add(half * leaving + i, 2 * leaving, from, virtual_heads);
        } else {
          gather.AddSource(from, virtual_heads);
        }
        first = false;
      }
    }
  }
  return gather;
}

// Where one head of the step's result lies among all that came back.
struct Arrival {
  int64_t from, stride;
};

// [T, heads] from what every rank of the group sent back at every step.
HeadGather UnpackQueries(const UlyssesPlan& plan) {
  HeadGather gather;
  gather.tokens = plan.local_tokens();
  int64_t at = 0;
  for (const UlyssesStep& step : plan.steps) {
    for (const UlyssesShare& share : *step.shares) {
      const int64_t n = Size(share.queries);
      for (int64_t i = 0; i < n; ++i) {
        gather.Add(share.queries[static_cast<size_t>(i)], plan.heads, at + i, n);
      }
      at += gather.tokens * n;
    }
  }
  return gather;
}

// [2, T, kv heads] from the gradients that came back; those of one kv head in the order of ranks.
template <class Heads>
HeadGather UnpackGradients(const UlyssesPlan& plan, const Heads& heads_of) {
  HeadGather gather;
  const int64_t tokens = plan.local_tokens();
  gather.tokens = tokens;
  // [kv head][rank]: a rank sends the gradients of a kv head once.
  const size_t ranks = plan.tokens.size();
  std::vector<std::vector<Arrival>> arrivals(static_cast<size_t>(plan.kv_heads),
                                             std::vector<Arrival>(ranks, {-1, 0}));
  int64_t at = 0;
  for (const UlyssesStep& step : plan.steps) {
    for (size_t r = 0; r < ranks; ++r) {
      const std::vector<int32_t>& heads = heads_of((*step.shares)[r]);
      const int64_t n = Size(heads);
      for (int64_t i = 0; i < n; ++i) {
        arrivals[static_cast<size_t>(heads[static_cast<size_t>(i)])][r] = {at + i, 2 * n};
      }
      at += tokens * 2 * n;
    }
  }
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t h = 0; h < plan.kv_heads; ++h) {
      bool first = true;
      for (const Arrival& a : arrivals[static_cast<size_t>(h)]) {
        if (a.from < 0) continue;
        const int64_t from = a.from + half * (a.stride / 2);
        if (first) {
          gather.Add(half * tokens * plan.kv_heads + h, plan.kv_heads, from, a.stride);
        } else {
          gather.AddSource(from, a.stride);
        }
        first = false;
      }
    }
  }
  return gather;
}

void AddGathers(UlyssesPlan& plan, UlyssesStep& step) {
  const auto queries = [](const UlyssesShare& s) -> auto& { return s.queries; };
  const auto keys = [](const UlyssesShare& s) -> auto& { return s.keys; };
  step.pack_queries = PackOf(step, plan, plan.heads, queries);
  step.pack_keys = PackOf(step, plan, plan.kv_heads, keys);
  const UlyssesShare& mine = step.share(plan.index);
  const int64_t tokens = plan.group_tokens();
  step.sum_whole = SumOf(mine, mine.whole, tokens);
  step.sum_partial = SumOf(mine, mine.partial, tokens);
  if (mine.kv_heads.empty()) return;
  const UlyssesStep& key_step = static_cast<size_t>(mine.key_step) < plan.steps.size()
                                    ? plan.steps[static_cast<size_t>(mine.key_step)]
                                    : step;
  step.repeat_keys.tokens = tokens;
  for (size_t v = 0; v < mine.slots.size(); ++v) {
    step.repeat_keys.Add(static_cast<int64_t>(v), Size(mine.kv_heads), mine.slots[v],
                         Size(key_step.share(plan.index).keys));
  }
}

}  // namespace

int64_t UlyssesPlan::group_tokens() const {
  return std::accumulate(tokens.begin(), tokens.end(), int64_t{0});
}

int UlyssesRanks(const StrategyOptions& options, int64_t heads, int ranks) {
  if (options.kind == StrategyKind::kUlysses) return ranks;
  if (options.ulysses_ranks > 0) return options.ulysses_ranks;
  const int node = options.ranks_per_node > 0 ? options.ranks_per_node : ranks;
  for (int u = static_cast<int>(std::min<int64_t>(heads, ranks - 1)); u > 1; --u) {
    if (ranks % u == 0 && node % u == 0) return u;
  }
  return ranks;
}

std::shared_ptr<const UlyssesLayout> MakeUlyssesLayout(const ContextDemand& demand,
                                                       const StrategyOptions& options) {
  auto layout = std::make_shared<UlyssesLayout>();
  const int ranks = static_cast<int>(demand.ranks());
  layout->kv_heads = demand.kv_heads();
  layout->heads = options.heads > 0 ? options.heads : demand.kv_heads();
  layout->group_ranks = UlyssesRanks(options, layout->heads, ranks);
  const bool hybrid = layout->group_ranks < ranks;  // with one group there is nothing outside
  layout->grouped =
      std::make_shared<const Placement>(demand.placement().Grouped(layout->group_ranks));

  const int64_t group = layout->heads / layout->kv_heads;
  const std::vector<int64_t> work = WorkOfHeads(demand);
  const HeadDeal deal = DealHeads(work, group, layout->group_ranks);
  const std::vector<bool> shared = SharedKvHeads(deal, group, layout->kv_heads);
  const int64_t steps = Steps(deal, group, options.head_groups, hybrid);
  std::vector<std::vector<UlyssesShare>> all;
  for (int r = 0; r < layout->group_ranks; ++r) {
    const auto& queries = deal.queries[static_cast<size_t>(r)];
    const auto shares = SharesOf(HeadSteps(queries, work, group, steps), group, shared);
    all.resize(std::max(all.size(), shares.size()),
               std::vector<UlyssesShare>(static_cast<size_t>(layout->group_ranks)));
    for (size_t s = 0; s < shares.size(); ++s) all[s][static_cast<size_t>(r)] = shares[s];
  }
  for (std::vector<UlyssesShare>& shares : all) {
    auto& pairs = layout->pairs.emplace_back();
    for (const UlyssesShare& share : shares) {
      int64_t sum = 0;
      for (const int32_t kv : share.kv_heads) sum += work[static_cast<size_t>(kv)];
      pairs.push_back(sum);
    }
    layout->steps.push_back(std::make_shared<const std::vector<UlyssesShare>>(std::move(shares)));
  }
  if (hybrid) PlanOuter(demand, options, *layout);
  return layout;
}

std::shared_ptr<const UlyssesPlan> MakeUlyssesPlan(const ContextDemand& demand,
                                                   const UlyssesLayout& layout, int rank,
                                                   bool with_masks) {
  auto plan = std::make_shared<UlyssesPlan>();
  const int size = layout.group_ranks, outer_rank = rank / size;
  plan->heads = layout.heads;
  plan->kv_heads = layout.kv_heads;
  plan->first_rank = outer_rank * size;
  plan->index = rank % size;
  plan->hybrid = !layout.outer.empty();
  for (int r = 0; r < size; ++r) {
    plan->tokens.push_back(demand.placement().local_tokens(plan->first_rank + r));
  }
  const auto index = static_cast<size_t>(plan->index);
  plan->steps.reserve(layout.steps.size());
  for (size_t s = 0; s < layout.steps.size(); ++s) {
    UlyssesStep step;
    step.shares = layout.steps[s];
    const UlyssesShare& mine = step.share(plan->index);
    step.pairs = layout.pairs[s][index];
    if (plan->hybrid) {
      if (const ProgramBuilder* builder = layout.outer[s][index].builder.get()) {
        Programs programs = builder->Build(outer_rank, with_masks);
        step.forward = std::move(programs.forward);
        step.backward = std::move(programs.backward);
      }
      MoveToCp(layout, plan->index, layout.forward_transfers[s], step.forward);
      MoveToCp(layout, plan->index, layout.backward_transfers[s], step.backward);
    } else if (with_masks && !mine.kv_heads.empty()) {
      const ops::BlockList& all = layout.grouped->blocks(0);
      step.mask = ops::BlockMask::Build(demand.pattern(), demand.kv_heads(), demand.documents(),
                                        all, all, mine.kv_heads);
    }
    if (with_masks) AddGathers(*plan, step);
    plan->steps.push_back(std::move(step));
  }
  if (!with_masks) return plan;
  const auto whole = [](const UlyssesShare& s) -> auto& { return s.whole; };
  const auto partial = [](const UlyssesShare& s) -> auto& { return s.partial; };
  plan->unpack_queries = UnpackQueries(*plan);
  plan->unpack_whole = UnpackGradients(*plan, whole);
  plan->unpack_partial = UnpackGradients(*plan, partial);
  return plan;
}

int64_t UlyssesWork(const UlyssesLayout& layout, int rank) {
  const auto index = static_cast<size_t>(rank % layout.group_ranks);
  const int outer_rank = rank / layout.group_ranks;
  int64_t work = 0;
  for (size_t s = 0; s < layout.steps.size(); ++s) {
    const UlyssesShare& share = (*layout.steps[s])[index];
    if (share.kv_heads.empty()) continue;
    work += share.group * (layout.outer.empty()
                               ? layout.pairs[s][index]
                               : layout.outer[s][index].demand->TotalPairs(outer_rank));
  }
  return work;
}

}  // namespace longspan::parallel
