#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "ops/attention/kv_table.h"
#include "parallel/context/builder.h"
#include "parallel/context/head_deal.h"
#include "parallel/context/head_gather.h"
#include "parallel/context/plan.h"

namespace longspan::parallel {

// Heads against sequence [Ulysses, arXiv 2309.14509]: neighbouring ranks form a group; inside it
// every rank gives away the heads of its tokens and gets all tokens of the group for its share of
// the heads, computes, and gives the outputs back. ulysses: one group of all ranks, and each step
// is one kernel over the whole rows. hybrid [USP, arXiv 2405.07719]: the ranks of equal place in
// their groups share heads, and their tokens meet through a program (ring or exchange).
//
// Any numbers of heads and ranks: query heads are dealt by their work (head_deal.h), kv heads go
// wherever a query head of theirs is, and a rank may have none. Heads go in steps, and the heads of
// the next step travel while one computes.
//
// Layouts   a step's tensors are [tokens of the group, heads of the step, D], tokens rank by rank
// in
//           their local order: what comes from a rank is one range, and nothing is unpacked. The
//           mask is built for that order. A rank's share of a kv head is split into virtual kv
//           heads of equally many query heads, which read the same keys
// Numerics  whole softmax on one rank (hybrid: as its program), so o and dq travel rounded to the
//           dtype of q. So do dK and dV of a kv head that one rank has alone; those of a shared one
//           travel in f32 (f64) and the owner of the tokens adds them in the order of ranks
// Traffic   forward q, k, v out and o, lse back; backward d_out, delta out and dq, dK, dV back.
//           q, k, v and lse of the heads are kept from one pass to the other
// Ranks     messages name ranks of cp, and every rank issues the same exchanges, those without
// heads
//           included: hybrid needs no communicators besides that of cp

// What one rank of a group does at one step.
struct UlyssesShare {
  std::vector<int32_t> queries;   // query heads it computes, ascending
  std::vector<int32_t> keys;      // kv heads whose keys come with this step
  std::vector<int32_t> kv_heads;  // [virtual kv heads] what they are
  std::vector<int32_t> slots;     // [virtual kv heads] their places in the keys of step key_step
  int64_t group = 1;              // query heads of a virtual kv head
  int32_t key_step = 0;
  // kv heads whose gradients leave after this step: final, and to be added to other ranks' ones.
  std::vector<int32_t> whole, partial;
};

// [ranks of a group], shared by their plans.
using UlyssesShares = std::shared_ptr<const std::vector<UlyssesShare>>;

struct UlyssesStep {
  UlyssesShares shares;
  // Of this rank. Both null or empty where it has no heads, but for the transfers of the programs;
  // in plans without masks there are neither masks nor gathers.
  std::shared_ptr<const ops::BlockMask> mask;  // ulysses: of the virtual kv heads
  Program forward, backward;                   // hybrid: of the virtual kv heads, peers of cp
  int64_t pairs = 0;                           // visible pairs over virtual kv heads, both passes

  HeadGather pack_queries, pack_keys;  // [T, heads] -> what leaves, rank by rank of the group
  HeadGather repeat_keys;              // keys of the step -> virtual kv heads
  HeadGather sum_whole, sum_partial;   // [2, N, virtual kv heads] -> [N, 2, heads] that leave
  std::unique_ptr<const ops::KvTableCache> tables = std::make_unique<ops::KvTableCache>();

  const UlyssesShare& share(int index) const { return (*shares)[static_cast<size_t>(index)]; }
};

struct UlyssesPlan {
  int64_t heads = 0, kv_heads = 0;
  int first_rank = 0;           // of the group, in cp
  int index = 0;                // of this rank in the group
  std::vector<int64_t> tokens;  // [ranks of the group]
  bool hybrid = false;
  std::vector<UlyssesStep> steps;
  // Everything that came back, step by step and rank by rank -> [T, heads] and [2, T, kv heads].
  HeadGather unpack_queries, unpack_whole, unpack_partial;

  int ranks() const { return static_cast<int>(tokens.size()); }
  int64_t local_tokens() const { return tokens[static_cast<size_t>(index)]; }
  int64_t group_tokens() const;
};

// What the plans of all ranks have in common: made once for many of them.
struct UlyssesLayout {
  int64_t heads = 0, kv_heads = 0;
  int group_ranks = 1;
  std::vector<UlyssesShares> steps;
  std::vector<std::vector<int64_t>> pairs;   // [step][rank of a group], over virtual kv heads
  std::shared_ptr<const Placement> grouped;  // groups as ranks
  // hybrid: for every step and place in a group (null without heads), and how many transfers the
  // programs of a step have at most.
  struct Outer {
    std::shared_ptr<const ContextDemand> demand;
    std::shared_ptr<const ProgramBuilder> builder;
  };
  std::vector<std::vector<Outer>> outer;
  std::vector<size_t> forward_transfers, backward_transfers;
};
// `options.kind` is kUlysses or kHybrid.
std::shared_ptr<const UlyssesLayout> MakeUlyssesLayout(const ContextDemand& demand,
                                                       const StrategyOptions& options);
std::shared_ptr<const UlyssesPlan> MakeUlyssesPlan(const ContextDemand& demand,
                                                   const UlyssesLayout& layout, int rank,
                                                   bool with_masks);
// Ranks of a group: StrategyOptions::ulysses_ranks, or if that is 0 the largest divisor of `ranks`
// that is at most the number of query heads and divides the ranks of a node, but not all ranks
// unless there is nothing else.
int UlyssesRanks(const StrategyOptions& options, int64_t heads, int ranks);

// (query, key) pairs over query heads that a rank computes.
int64_t UlyssesWork(const UlyssesLayout& layout, int rank);

}  // namespace longspan::parallel
