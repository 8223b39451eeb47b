#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace longspan::parallel {

// Which query heads each of some ranks computes when heads are split instead of tokens: any number
// of heads on any number of ranks. Query heads of one kv head share its keys, so those that one
// rank has cost one transfer; a kv head on several ranks is sent to each of them.
struct HeadDeal {
  std::vector<std::vector<int32_t>> queries;  // [ranks]: ascending query heads; may be empty
  int64_t work_max = 0;                       // of one rank, in the unit of `work`
};

// `work` [kv heads]: of one query head of each kv head, >= 0; `group`: query heads per kv head.
//
// Deals units of u query heads of one kv head, for every divisor u of `group`, longest first to the
// rank with least work, and then moves and swaps units while the busiest rank gets less. The
// largest u counts whose busiest rank has at most 1 % more than the best one's: it sends the fewest
// keys. Integers only, the same on every rank.
HeadDeal DealHeads(std::span<const int64_t> work, int64_t group, int ranks);

// The query heads of one rank as consecutive steps, so that the keys of the next step travel while
// one computes. Steps hold whole kv heads of about equal work; the query heads of a rank that has
// one kv head only are split instead (their keys come with the first step).
std::vector<std::vector<int32_t>> HeadSteps(std::span<const int32_t> queries,
                                            std::span<const int64_t> work, int64_t group,
                                            int64_t steps);

}  // namespace longspan::parallel
