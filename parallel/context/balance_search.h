#pragma once
#include <cstdint>
#include <span>
#include <vector>

// The search of balance.h, which works on numbers alone. Not for use outside parallel/context.
namespace longspan::parallel::internal {

struct BalanceProblem {
  int64_t rows, blocks_per_row, ranks;
  std::span<const int64_t> work;  // [rows, blocks_per_row]
};

struct BalanceCandidate {
  std::vector<int32_t> owner;  // [rows, blocks_per_row]; ranks are numbered by their first blocks
  int64_t largest = 0;         // work of the rank that has most
  int64_t runs = 0;            // maximal runs of blocks of one rank
};

// What was found within 1 % of the smallest largest work, the fewest runs first; never empty.
std::vector<BalanceCandidate> BalanceCandidates(const BalanceProblem& problem);

}  // namespace longspan::parallel::internal
