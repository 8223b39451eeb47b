#include "ops/core/check.h"
#include "parallel/context/choose.h"
#include "parallel/context/ulysses.h"

namespace longspan::parallel {
namespace {

using Kind = TimelineEvent::Kind;
using Heads = std::vector<int32_t> UlyssesShare::*;

int64_t Size(const std::vector<int32_t>& v) { return static_cast<int64_t>(v.size()); }

// Bytes of one token and head of one of the tensors of an exchange of heads.
struct Stream {
  Heads heads;
  int64_t bytes;
};

// The chain of ulysses.cpp: RunChain and its two passes, as events.
class Chain {
 public:
  Chain(const UlyssesPlan& plan, const PlanSizes& sizes, bool backward)
      : plan_(plan), sizes_(sizes), backward_(backward) {
    const auto element = static_cast<int64_t>(SizeOf(sizes.dtype));
    const auto wide = static_cast<int64_t>(SizeOf(AccumulatorOf(sizes.dtype)));
    const int64_t vector = sizes.head_dim * element;
    const Heads queries = &UlyssesShare::queries, keys = &UlyssesShare::keys;
    if (backward) {
      away_ = {{queries, vector}};
      home_ = {{queries, vector},
               {&UlyssesShare::whole, 2 * vector},
               {&UlyssesShare::partial, 2 * sizes.head_dim * wide}};
    } else {
      away_ = {{queries, vector}, {keys, vector}, {keys, vector}};
      home_ = {{queries, vector}};
    }
    if (!sizes.sigmoid) (backward ? away_ : home_).push_back({queries, wide});  // delta, lse
  }

  Timeline Write() {
    const size_t steps = plan_.steps.size();
    std::vector<int32_t> results;
    int32_t coming = steps > 0 ? Post(0, away_, /*to_heads=*/true) : 0;
    for (size_t s = 0; s < steps; ++s) {
      const int32_t next = s + 1 < steps ? Post(s + 1, away_, true) : 0;
      Wait(coming);
      coming = next;
      Compute(s);
      results.push_back(Post(s, home_, false));
    }
    for (const int32_t transfer : results) Wait(transfer);
    return std::move(timeline_);
  }

 private:
  int32_t Post(size_t s, const std::vector<Stream>& streams, bool to_heads) {
    TimelineEvent event{.kind = Kind::kPost, .transfer = next_++};
    const UlyssesStep& step = plan_.steps[s];
    const int ranks = plan_.ranks();
    for (const Stream& stream : streams) {
      for (int d = 1; d < ranks; ++d) {
        const int r = (plan_.index + d) % ranks, peer = plan_.first_rank + r;
        const int64_t here = plan_.local_tokens() * Size(step.share(r).*stream.heads);
        const int64_t there =
            plan_.tokens[static_cast<size_t>(r)] * Size(step.share(plan_.index).*stream.heads);
        const auto add = [&](int64_t vectors, bool send) {
          if (vectors > 0)
            (send ? event.sends : event.recvs).push_back({peer, vectors * stream.bytes});
        };
        add(here, to_heads);
        add(there, !to_heads);
      }
    }
    timeline_.push_back(std::move(event));
    return timeline_.back().transfer;
  }
  void Wait(int32_t transfer) { timeline_.push_back({.kind = Kind::kWait, .transfer = transfer}); }

  void Compute(size_t s) {
    const UlyssesStep& step = plan_.steps[s];
    const UlyssesShare& share = step.share(plan_.index);
    const Program& program = backward_ ? step.backward : step.forward;
    ProgramSizes sizes;
    sizes.kv_heads = std::max<int64_t>(1, Size(share.kv_heads));
    sizes.heads = sizes.kv_heads * share.group;
    sizes.head_dim = sizes_.head_dim;
    sizes.key_bytes = static_cast<int64_t>(SizeOf(sizes_.dtype));
    sizes.grad_bytes = static_cast<int64_t>(SizeOf(AccumulatorOf(sizes_.dtype)));
    sizes.backward = backward_;
    if (plan_.hybrid) {
      for (TimelineEvent event : MakeTimeline(program, sizes)) {
        if (event.kind != Kind::kCompute) event.transfer += next_;
        timeline_.push_back(std::move(event));
      }
      next_ += static_cast<int32_t>(program.transfers.size());
    } else if (!share.queries.empty()) {
      timeline_.push_back({.kind = Kind::kCompute, .flops = StepFlops(step.pairs, sizes)});
    }
  }

  const UlyssesPlan& plan_;
  const PlanSizes& sizes_;
  const bool backward_;
  std::vector<Stream> away_, home_;
  Timeline timeline_;
  int32_t next_ = 0;  // number of the next transfer, the same on all ranks
};

}  // namespace

PlanTimelines MakeTimelines(const AttentionPlan& plan, const PlanSizes& sizes) {
  LONGSPAN_CHECK(sizes.heads >= 1 && sizes.heads % plan.kv_heads == 0)
      << "MakeTimelines: " << sizes.heads << " query heads for " << plan.kv_heads << " kv heads";
  ProgramSizes program{.heads = sizes.heads,
                       .kv_heads = plan.kv_heads,
                       .head_dim = sizes.head_dim,
                       .key_bytes = static_cast<int64_t>(SizeOf(sizes.dtype)),
                       .grad_bytes = static_cast<int64_t>(SizeOf(AccumulatorOf(sizes.dtype)))};
  if (plan.ulysses != nullptr) {
    LONGSPAN_CHECK(sizes.heads == plan.ulysses->heads)
        << "MakeTimelines: " << sizes.heads << " query heads but the plan deals "
        << plan.ulysses->heads << "; set StrategyOptions::heads";
    return {Chain(*plan.ulysses, sizes, false).Write(), Chain(*plan.ulysses, sizes, true).Write()};
  }
  PlanTimelines timelines;
  const auto whole = [&] {
    return TimelineEvent{.kind = Kind::kCompute, .flops = StepFlops(plan.visible_pairs, program)};
  };
  if (plan.ranks == 1) timelines.forward.push_back(whole());
  if (plan.ranks > 1) timelines.forward = MakeTimeline(plan.forward, program);
  program.backward = true;
  if (plan.ranks == 1) timelines.backward.push_back(whole());
  if (plan.ranks > 1) timelines.backward = MakeTimeline(plan.backward, program);
  return timelines;
}

}  // namespace longspan::parallel
