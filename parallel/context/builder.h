#pragma once
#include <memory>

#include "parallel/context/demand.h"
#include "parallel/context/plan.h"
#include "parallel/context/program.h"

namespace longspan::parallel {

namespace internal {
class ExchangeRoutes;
}

struct Programs {
  Program forward, backward;
};

// Writes the programs of the strategies whose queries stay at home: kRing, kDoubleRing, kAllGather
// and kExchange of `options`. P = ranks of the demand, r = a rank:
//
//   ring         P - 1 hops of whole shards; backward in the reverse order, starting with the keys
//                that came last (kKept), so that P - 2 hops of keys and P - 1 of gradients remain,
//                own keys last
//   double_ring  rings inside each node of ranks_per_node ranks; meanwhile what a node's ring
//                started with goes to the next node. Backward mirrors it: a node sums up its
//                gradients in its ring, and the sums of nodes travel during the next ring
//   all_gather   every rank's keys of one group of kv heads after another, one kernel each, the
//                next group in flight. Backward gathers again; partial gradients of a group go to
//                their owners while the next one computes
//   exchange     needed pieces from their owners. Own keys first; the other ranks, in the order
//                r + 1, r + 2, ..., are dealt to `stages` groups of about equal bytes, of which the
//                next one is in flight while one computes. Backward: own keys last; keys are taken
//                from kKept when all that this rank receives is at most keep_rows, else fetched
//                again, the first group while half of the own keys computes; partial gradients
//                travel while the next group computes
//     deduplicate   (nodes of ranks_per_node ranks, more than one node) a piece that several ranks
//                of another node need goes to one of those that need it, chosen by a hash of the
//                block, which forwards it in its node one step later. Their gradients are summed
//                there, own share first, then in ascending rank, and go to the owner as one.
//                keep_rows then decides for a node: its neediest rank must fit
//
// Sums at the owner: in the order of the groups, in each in ascending source rank. Transfers are
// the same list on every rank, also where a rank has no messages. Needs neither head_dim nor dtype.
//
// Time     the constructor of exchange O(patterns * ranks * blocks); make one for all ranks
// Errors   InvalidArgument for other strategies, and for a double ring whose ranks are not whole
//          nodes
// Threads  Build may be called from several threads
class ProgramBuilder {
 public:
  ProgramBuilder(const ContextDemand& demand, const StrategyOptions& options);

  // Of one rank; empty programs when there is only one. Without masks: for forecasts, see Program.
  Programs Build(int rank, bool with_masks = true) const;

 private:
  ContextDemand demand_;
  StrategyOptions options_;
  std::shared_ptr<const internal::ExchangeRoutes> routes_;  // of exchange
};

}  // namespace longspan::parallel
