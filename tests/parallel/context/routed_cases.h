#pragma once
#include <memory>
#include <string>
#include <vector>

#include "parallel/context/placement.h"
#include "parallel/context/routed.h"
#include "tests/ops/attention/moba_fixture.h"

// One layer of routed attention, forward and backward, split over ranks as threads.
namespace longspan::test {

struct RoutedCase {
  MobaCase moba;
  parallel::PlacementKind placement = parallel::PlacementKind::kContiguous;
  int ranks = 1;
  int64_t keep_rows = 0;
  Device device{};
  std::string implementation{};
  std::string Name() const;
};

std::shared_ptr<const parallel::Placement> PlacementOf(const RoutedCase& c);

// What one rank sent in a pass.
struct RoutedBytes {
  int64_t payload = 0, control = 0;
  int64_t routed = 0;            // counted as Traffic::kRouted
  std::vector<int64_t> calls{};  // by operation, control last
};
struct RoutedOutcome {
  Vec o, lse, dq, dk, dv;                      // in global order
  std::vector<int32_t> selected;               // [heads, T, width]
  std::vector<RoutedBytes> forward, backward;  // by rank
  // Of own blocks, as their plan says; and the bytes that RoutedPlan::ControlBytes says.
  std::vector<int64_t> own_forward, own_backward, planned_control;
};
RoutedOutcome RunRouted(const RoutedCase& c, const MobaInputs& in);

// Counted token by token from a choice, the rows (one token of one kv head) of chosen blocks that
// ranks need and do not have, by rank: received, and sent.
struct RoutedNeed {
  std::vector<int64_t> received, sent;
  std::vector<std::vector<int64_t>> between;  // [from][to]
  // Routed blocks of which a rank has a token, at most; and how many there are.
  int64_t most_blocks = 0, blocks = 0;
  int64_t width = 0;
};
RoutedNeed CountNeed(const RoutedCase& c, const MobaChoice& choice);

}  // namespace longspan::test
