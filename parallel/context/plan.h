#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ops/attention/block_mask.h"
#include "parallel/comm/communicator.h"
#include "parallel/context/demand.h"
#include "parallel/context/placement.h"
#include "parallel/context/program.h"

namespace longspan::parallel {

struct UlyssesPlan;  // ulysses.h

// How the ranks of the cp axis work together on one layer of attention. P = ranks.
//   ring         keys and values hop round all ranks, each stage computes what has come
//                [arXiv 2310.01889]
//   double_ring  inner rings of the ranks of a node, an outer ring between nodes, so that every
//                rank uses its own link between nodes [arXiv 2406.18485]
//   all_gather   keys of all ranks, group by group of kv heads [arXiv 2407.21783 section 3.3.2]
//   ulysses      tokens of all ranks against a share of the heads [arXiv 2309.14509]
//   hybrid       ulysses among neighbouring ranks, `outer` between those groups [arXiv 2405.07719]
//   exchange     only the keys that a rank's queries see, straight from their owners, per kv head
//   auto         none of its own: ChooseStrategy (choose.h) says which of the others
enum class StrategyKind { kRing, kDoubleRing, kAllGather, kUlysses, kHybrid, kExchange, kAuto };
const char* ToString(StrategyKind kind);  // "RING", "DOUBLE_RING", ...

struct StrategyOptions {
  StrategyKind kind = StrategyKind::kRing;
  // Query heads, a multiple of the kv heads: ulysses and hybrid deal them. 0: as many as kv heads.
  int64_t heads = 0;
  int ranks_per_node = 0;  // neighbouring ranks of cp; 0: all are one node
  int stages = 0;          // exchange: stages of remote keys; 0: 2
  // all_gather, ulysses, hybrid: groups of heads, of which the next one is in flight while one
  // computes; 0: chosen. Ranks with fewer heads do with fewer groups.
  int64_t head_groups = 0;
  // exchange: received rows that stay for the backward pass when all of a layer's fit; otherwise
  // they are fetched again.
  int64_t keep_rows = 0;
  int ulysses_ranks = 0;                     // hybrid: of a group, a divisor of P; 0: chosen
  StrategyKind outer = StrategyKind::kRing;  // hybrid: kRing or kExchange
  // exchange: keys that several ranks of another node need cross to it once.
  bool deduplicate = true;
  bool operator==(const StrategyOptions&) const = default;

  // What is impossible with these numbers, one sentence each; empty when usable.
  std::vector<std::string> Problems(int64_t kv_heads, int ranks) const;
};

// What a plan says about itself. Rows: one token of one kv head, K and V (dK and dV) together.
struct PlanFigures {
  // Keys that this rank must receive in a pass, whatever the strategy, if its queries stay home.
  int64_t lower_bound_rows = 0;
  // Keys and gradients of keys, as the transfers move them.
  int64_t forward_sent_rows = 0, forward_received_rows = 0;
  int64_t backward_sent_rows = 0, backward_received_rows = 0;
  int64_t grad_sent_rows = 0, grad_received_rows = 0;
  // Visible (query, key) pairs over kv heads (ulysses: over query heads, divided by their number
  // per kv head) that the busiest rank computes, and the mean of all ranks.
  double work_max = 0, work_mean = 0;
  // Of what all ranks must agree on: pattern, documents, placement and options. 0 on one rank.
  uint64_t hash = 0;
};

// What one rank does for one attention pattern and one micro-batch: pure data, derived from the
// pattern, the documents, the placement and the options alone, without communication.
struct AttentionPlan {
  StrategyKind strategy = StrategyKind::kRing;
  int rank = 0, ranks = 1;
  int64_t kv_heads = 0;
  int64_t local_tokens = 0;  // of this rank
  // One rank: everything, and the programs are empty.
  std::shared_ptr<const ops::BlockMask> whole{};
  Program forward{}, backward{};                 // of those whose queries stay at home
  std::shared_ptr<const UlyssesPlan> ulysses{};  // of ulysses and hybrid, else null
  PlanFigures figures{};
  int64_t visible_pairs = 0;

  // Visible (query, key) pairs of this rank's queries, over kv heads, whoever computes them.
  int64_t VisiblePairs() const { return visible_pairs; }
};

// Errors: InvalidArgument for options with Problems(), and for a pattern with Problems().
std::shared_ptr<const AttentionPlan> MakePlan(const ops::AttentionPattern& pattern,
                                              int64_t kv_heads,
                                              std::shared_ptr<const ops::Documents> documents,
                                              std::shared_ptr<const Placement> placement,
                                              const StrategyOptions& options, int rank);
std::shared_ptr<const AttentionPlan> MakePlan(const ops::AttentionPattern& pattern,
                                              int64_t kv_heads,
                                              std::shared_ptr<const ops::Documents> documents,
                                              const Placement& placement,
                                              const StrategyOptions& options, int rank);

// Makes the plans of any ranks from one demand: what they have in common is derived once.
// Errors as MakePlan. Threads: Build may be called from several.
class PlanMaker {
 public:
  PlanMaker(std::shared_ptr<const ContextDemand> demand, const StrategyOptions& options);
  ~PlanMaker();
  // Without masks the plan has all transfers and amounts of work but cannot run: for forecasts.
  std::shared_ptr<const AttentionPlan> Build(int rank, bool with_masks = true) const;

 private:
  struct Parts;
  std::unique_ptr<const Parts> parts_;
};

// Collective. Ranks that made their plans from other documents, placements or options would wait
// for messages that never come, or add gradients to the wrong tokens. Throws CommError on every
// rank, naming the ranks that differ from most, when figures.hash is not the same everywhere.
// Sends 16 bytes a rank (times two in an all-reduce) while they agree, counted as control traffic.
void CheckSamePlan(Communicator& comm, const AttentionPlan& plan);
// The same of many plans by one fingerprint of their hashes. Of a job of `ranks` ranks `comm` holds
// those from `first` on, which is how they are named (0: `comm` is all there are).
void CheckSamePlans(Communicator& comm, uint64_t hash, int first = 0, int ranks = 0);
// What they throw for ranks first, first + 1, ... of `ranks` that have these fingerprints; empty
// when all are the same.
std::string DifferingPlans(std::span<const int64_t> fingerprints, int first, int ranks);

}  // namespace longspan::parallel
